"""Matryoshka Embedding Pooling: token states to group means, and group means to coarser ones.

Pure functions over arrays; nothing here knows tokenizers, models or storage. `ratio` is the paper's
r (arXiv 2606.22807, section on MEP); the published code calls it `chunk_size`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kalm_encoder.errors import InputError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from kalm_encoder.packing import Packed


@dataclass(frozen=True, slots=True)
class PassageStates:
    """One encoded passage.

    Attributes:
        states: (m, d) group means, m = ceil(num_tokens / ratio); float32 from the encoder, the
            store's dtype from a table.
        num_tokens: tokens encoded, prefix included, after truncation; exact coarsening needs it.
        truncated: whether the passage was longer than the encoder's max_length.
    """

    states: NDArray[np.floating]
    num_tokens: int
    truncated: bool


def num_groups(num_tokens: int, ratio: int) -> int:
    """Return ceil(num_tokens / ratio), the number of stored vectors of a passage."""
    return -(-num_tokens // ratio)


def mean_pool(states: torch.Tensor, mask: torch.Tensor, ratio: int) -> torch.Tensor:
    """Average every `ratio` consecutive token states; padding never enters a mean.

    Same as `_pool_encoder_chunks` of the reference, but accumulated in float32.

    Args:
        states: (b, n, d) encoder output, right padded.
        mask: (b, n), 1 or True for real tokens.
        ratio: tokens a group, >= 1.

    Returns:
        (b, ceil(n / ratio), d) float32. Row i holds num_groups(mask[i].sum(), ratio) group means,
        then zeros.

    Example: n = 5 tokens 1, 2, 3, 4, 5 (d = 1) at ratio 2 give 1.5, 3.5, 5.0.
    """
    b, n, d = states.shape
    m = num_groups(n, ratio)
    weights = mask.to(dtype=states.dtype)
    grouped = states.new_zeros((b, m * ratio, d))
    grouped[:, :n] = states * weights.unsqueeze(-1)
    counts = weights.new_zeros((b, m * ratio))
    counts[:, :n] = weights
    sums = grouped.view(b, m, ratio, d).float().sum(dim=2)
    return sums / counts.view(b, m, ratio).float().sum(dim=2).clamp(min=1).unsqueeze(-1)


def pool_packed(hidden: torch.Tensor, packed: Packed, ratio: int) -> torch.Tensor:
    """Average every `ratio` consecutive token states of each passage of a packed batch.

    As `mean_pool`, without padding. The device is never waited for, and sums are taken in a fixed
    order: the same batch gives the same bits.

    Args:
        hidden: (T, d) encoder output, the passages one behind the other.
        packed: where they lie.
        ratio: tokens a group, >= 1.

    Returns:
        (G, d) float32, the num_groups(n, ratio) group means of each passage one behind the other.
    """
    total = sum(num_groups(n, ratio) for n in packed.lengths)
    groups = (packed.sizes + (ratio - 1)) // ratio
    first = (groups.cumsum(0) - groups) * ratio
    slots = packed.positions + packed.spread(first)
    wide = hidden.float()
    grouped = wide.new_zeros((total * ratio, wide.shape[1]))
    grouped[slots] = wide
    counts = wide.new_zeros(total * ratio)
    counts.index_fill_(0, slots, 1.0)
    sums = grouped.view(total, ratio, -1).sum(dim=1)
    return sums / counts.view(total, ratio).sum(dim=1, keepdim=True)


def coarsen(
    pooled: NDArray[np.floating], num_tokens: int, stored: int, wanted: int
) -> NDArray[np.floating]:
    """Turn group means at ratio `stored` into those at `wanted`, exactly.

    Each stored mean is weighted by its number of tokens: the last group of a passage may be short,
    and a plain mean of means would be wrong there.

    Args:
        pooled: (ceil(num_tokens / stored), d).
        num_tokens: tokens of the passage.
        stored: ratio of `pooled`.
        wanted: a multiple of `stored`.

    Returns:
        (ceil(num_tokens / wanted), d) float32; `pooled` itself where the ratios are equal.

    Raises:
        InputError: `wanted` is no multiple of `stored`, or `pooled` does not fit `num_tokens`.

    Example: means 1.5, 3.5, 5.0 of 5 tokens at ratio 2 become (2*1.5 + 2*3.5) / 4 = 2.5 and 5.0 at
    ratio 4.
    """
    if wanted < stored or wanted % stored:
        raise InputError(f"ratio {wanted} is not a multiple of the stored ratio {stored}")
    if len(pooled) != num_groups(num_tokens, stored):
        raise InputError(
            f"{len(pooled)} states cannot belong to {num_tokens} tokens at ratio {stored}"
        )
    if wanted == stored:
        return pooled
    weights = np.full((len(pooled), 1), stored, dtype=np.float32)
    weights[-1] = num_tokens - stored * (len(pooled) - 1)
    starts = np.arange(0, len(pooled), wanted // stored)
    sums = np.add.reduceat(pooled.astype(np.float32) * weights, starts, axis=0)
    return sums / np.add.reduceat(weights, starts, axis=0)
