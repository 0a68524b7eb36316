"""Matrix products on CPUs through oneDNN, with weights that are packed once.

torch sends float32 products to MKL, which on AMD processors uses only AVX2 and reaches 115 GFLOP/s
per core. oneDNN compiles for AVX-512 and reaches 265. Without AVX-512 MKL is faster, with 80
against 71 (docs/benchmarks.md). Products in bfloat16 always go to oneDNN, which lays the weight out
anew in each call unless it is packed; packed, one core with AMX reaches 1,100. The operators are
those that torch.compile itself emits for a CPU. Results differ only by float32 rounding.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch

LIKELY_ROWS = 1024
"""Number of rows that packed weights are laid out for; other numbers work as well."""
AVAILABLE = (
    platform.machine() in ("x86_64", "AMD64")
    and torch._C._has_mkldnn
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
FASTER = AVAILABLE and "AVX512" in torch.backends.cpu.get_cpu_capability()
"""Whether float32 products are faster through oneDNN than through MKL."""
BFLOAT16 = AVAILABLE and (
    torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
)
"""Whether this CPU has instructions that multiply bfloat16."""


def usable(weight: torch.Tensor) -> bool:
    """Return whether products with this weight go through oneDNN on this machine."""
    return FASTER and weight.device.type == "cpu" and weight.dtype == torch.float32


def products(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return each x @ weight.T, (h, n, k) and (h, m, k) to (h, n, m), by the faster library.

    oneDNN takes one product at a time: give it one.
    """
    if usable(weight):
        return torch.stack([_product(*pair) for pair in zip(x, weight, strict=True)])
    return torch.bmm(x, weight.transpose(1, 2))


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return found


def packable(weight: torch.Tensor) -> bool:
    """Return whether products with this weight are faster once it is packed."""
    bfloat16 = BFLOAT16 and weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return bfloat16 or usable(weight)


class PackedLinear(torch.nn.Module):
    """Replacement of a Linear without bias, with the weight in oneDNN's own layout."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), LIKELY_ROWS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (…, out_features) of (…, in_features)."""
        return _product(x, self._weight)

    def __reduce__(self) -> tuple[Callable[[torch.Tensor], torch.nn.Module], tuple[torch.Tensor]]:
        # The layout is this CPU's: torch does not pickle it, and another CPU may want none.
        return _linear, (self._weight.to_dense(),)


def _linear(weight: torch.Tensor) -> torch.nn.Module:
    """Return the Linear of a weight, packed if that is faster on this machine."""
    if packable(weight):
        return PackedLinear(weight)
    outputs, inputs = weight.shape
    plain = torch.nn.Linear(inputs, outputs, bias=False, device="meta")
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    return plain


def pack_linears(module: Any) -> None:
    """Replace each Linear without bias in a module by a PackedLinear if that is faster.

    The weights are moved and not kept twice.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            plain = isinstance(child, torch.nn.Linear) and child.bias is None
            if plain and packable(child.weight):
                setattr(parent, name, PackedLinear(child.weight))
