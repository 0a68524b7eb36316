"""Float32 matrix products on CPUs with AVX-512 through oneDNN instead of MKL.

torch sends float32 products to MKL, which on AMD processors keeps to AVX2: 115 GFLOP/s a core
where oneDNN, compiling for AVX-512, reaches 265. Without AVX-512 MKL is the faster one, 80 against
71 (docs/benchmarks.md). The operators are those that torch.compile itself emits for a CPU.
Results differ by float32 rounding alone.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch.nn.functional import linear

LIKELY_ROWS = 1024
"""Rows that packed weights are laid out for; other numbers work as well."""


AVAILABLE = (
    platform.machine() in ("x86_64", "AMD64")
    and torch._C._has_mkldnn
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
FASTER = AVAILABLE and "AVX512" in torch.backends.cpu.get_cpu_capability()


def usable(weight: torch.Tensor) -> bool:
    """Whether products with this weight go through oneDNN here."""
    return FASTER and weight.device.type == "cpu" and weight.dtype == torch.float32


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x @ weight.T, (n, k) and (m, k) to (n, m), by the fastest exact way there is."""
    return _product(x, weight) if usable(weight) else linear(x, weight)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return found


class PackedLinear(torch.nn.Module):
    """A bias-free Linear whose weight lies in oneDNN's own layout; takes the place of one."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), LIKELY_ROWS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (…, out_features) of (…, in_features)."""
        return _product(x, self._weight)


def pack_linears(module: Any) -> None:
    """Replace each Linear without bias in a module by a PackedLinear, where oneDNN is faster.

    The weights are moved, not kept twice.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            plain = isinstance(child, torch.nn.Linear) and "bias" not in dict(
                child.named_parameters()
            )
            if plain and usable(child.weight):
                setattr(parent, name, PackedLinear(child.weight))
