"""Which items go through a forward together, and where the passages of a packed batch lie.

The decoder takes padded batches of similar length, the encoder takes packed ones: the passages lie
one behind the other without padding. Everything about a packed batch is computed without waiting
for a GPU, so that batches can be sent to it ahead of time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch


def make_batches(
    lengths: Sequence[int], budget: int, *, overhead: int = 0, max_padding: float = 1.0
) -> list[list[int]]:
    """Group items so that rows x (longest row + overhead) stays within the budget.

    Args:
        lengths: Size of each item, in tokens or states.
        budget: What one batch may cost, with padding. An item that costs more goes alone.
        overhead: What each row costs in addition to its length (a prompt that every row repeats).
        max_padding: Largest share of padding in a batch; overhead counts as content.

    Returns:
        Batches of indices into `lengths`, each index once, longest items first: memory then peaks
        in the first batch and not in the last.

    Example: Lengths 3, 9, 8 with budget 18 give [[1, 2], [0]], because 2 x 9 = 18 fits and 3 x 9
    does not.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    content = 0  # of the last batch
    for i in order:
        size = lengths[i] + overhead
        if batches:
            cost = (len(batches[-1]) + 1) * (lengths[batches[-1][0]] + overhead)
            if cost <= budget and cost - content - size <= max_padding * cost:
                batches[-1].append(i)
                content += size
                continue
        batches.append([i])
        content = size
    return batches


def make_packed_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group passages that are packed without padding into batches of about the same size.

    Args:
        lengths: Number of tokens of each passage.
        budget: Number of tokens of one batch. A passage that is longer goes alone.

    Returns:
        Batches of indices into `lengths`, each index once, in order.

    Example: Lengths 3, 9, 8, 4 with budget 18 give [[0, 1], [2, 3]]. The 24 tokens need two
    batches, so each gets about 12 of them; filling the first batch would leave a small last one.
    """
    aim = sum(lengths) / max(1, -(-sum(lengths) // budget))
    batches: list[list[int]] = []
    size = 0
    for i, length in enumerate(lengths):
        if not batches or size >= aim or size + length > budget:
            batches.append([])
            size = 0
        batches[-1].append(i)
        size += length
    return batches


def send(values: Any, device: torch.device) -> torch.Tensor:
    """Return values as an int64 tensor on the device, without waiting for its current work."""
    tensor = torch.as_tensor(values, dtype=torch.long)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def fetch(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the CPU, which a GPU fills when it is done with the work before it."""
    if tensor.device.type == "cuda":
        there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return there.copy_(tensor, non_blocking=True)
    return tensor


class Packed:
    """The places of b passages with T tokens in all in a packed batch.

    Args:
        lengths: Number of tokens of each passage; none is 0.
        device: Device of the tensors.

    Attributes:
        sizes: The lengths as a tensor, (b,) int64.
        starts: The first token of each passage, followed by T: (b + 1,) int32.
        positions: The position of each token in its passage, (T,) int64.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = lengths
        self.device = device
        self.sizes = send(lengths, device)
        self.starts = torch.nn.functional.pad(self.sizes.cumsum(0), (1, 0)).int()
        places = torch.arange(sum(lengths), device=device)
        self.positions = places - self.spread(self.starts[:-1])

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Repeat the (b,) value of each passage for each of its tokens: (T,)."""
        return values.repeat_interleave(self.sizes, output_size=sum(self.lengths))

    @cached_property
    def grids(self) -> tuple[torch.Tensor, list[tuple[int, int, torch.Tensor]]]:
        """Where each token lies when passages are padded to powers of two.

        Returns:
            The place of each token in a buffer of all grids, (T,) int64; and for each grid its
            number of rows, of columns, and the lengths of the passages in its rows, (rows,) int64.
        """
        members = defaultdict(list)
        for i, length in enumerate(self.lengths):
            members[1 << (length - 1).bit_length()].append(i)
        firsts, grids, size = [0] * len(self.lengths), [], 0
        for columns, rows in sorted(members.items()):
            for i in rows:
                firsts[i] = size
                size += columns
            grids.append((len(rows), columns, send([self.lengths[i] for i in rows], self.device)))
        return self.positions + self.spread(send(firsts, self.device)), grids
