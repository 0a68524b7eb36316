"""Where the passages of a packed batch lie: one behind the other, no padding between them.

All of it is computed without waiting for a GPU, so that batches can be sent to it ahead of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch


def send(values: Any, device: torch.device) -> torch.Tensor:
    """Return values as an int64 tensor on the device, without waiting for what it does now."""
    pinned = device.type == "cuda"
    return torch.tensor(values, dtype=torch.long, pin_memory=pinned).to(device, non_blocking=True)


@dataclass(frozen=True)
class Packed:
    """The lengths of b passages of T tokens in all.

    Attributes:
        lengths: tokens of each passage, none 0.
        device: where the tensors are.
    """

    lengths: Sequence[int]
    device: torch.device

    @cached_property
    def sizes(self) -> torch.Tensor:
        """Lengths, (b,) int64."""
        return send(self.lengths, self.device)

    @cached_property
    def starts(self) -> torch.Tensor:
        """First token of each passage, then T: (b + 1,) int32."""
        return torch.nn.functional.pad(self.sizes.cumsum(0), (1, 0)).int()

    @cached_property
    def positions(self) -> torch.Tensor:
        """Place of each token in its passage, (T,) int64."""
        places = torch.arange(sum(self.lengths), device=self.device)
        return places - self.spread(self.starts[:-1])

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Return (T,): the value of each token's passage, of (b,)."""
        return values.repeat_interleave(self.sizes, output_size=sum(self.lengths))
