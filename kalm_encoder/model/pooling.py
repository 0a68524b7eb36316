"""Mean pooling of token states on the device, for padded batches and for packed ones."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from kalm_encoder.matryoshka import num_groups
from kalm_encoder.model.batching import Packed


def mean_pool(states: torch.Tensor, mask: torch.Tensor, ratio: int) -> torch.Tensor:
    """Average every `ratio` consecutive token states; padding never enters a mean.

    This is `_pool_encoder_chunks` of the reference, but the sums are float32. Production code pools
    packed batches; the training of the demo model and the tests pool padded ones.

    Args:
        states: Encoder output, (b, n, d), padded on the right.
        mask: (b, n), 1 or True for real tokens.
        ratio: Number of tokens per group, >= 1.

    Returns:
        (b, ceil(n / ratio), d) float32. Row i holds num_groups(mask[i].sum(), ratio) group means,
        followed by zeros.

    Example: The states 1, 2, 3, 4, 5 (n = 5, d = 1) at ratio 2 give 1.5, 3.5, 5.0.
    """
    b, n, d = states.shape
    m = num_groups(n, ratio)
    missing = m * ratio - n
    weights = mask.to(dtype=states.dtype)
    grouped = pad(states * weights.unsqueeze(-1), (0, 0, 0, missing)).view(b, m, ratio, d)
    counts = pad(weights, (0, missing)).view(b, m, ratio).float().sum(dim=2)
    return grouped.float().sum(dim=2) / counts.clamp(min=1).unsqueeze(-1)


def pool_packed(hidden: torch.Tensor, packed: Packed, ratio: int) -> torch.Tensor:
    """Average every `ratio` consecutive token states of each passage of a packed batch.

    It does not wait for the device, and it takes sums in a fixed order, so that the same batch
    gives the same bits.

    Args:
        hidden: Encoder output, (T, d), the passages one behind the other.
        packed: Where each passage lies.
        ratio: Number of tokens per group, >= 1.

    Returns:
        (G, d) float32: the num_groups(n, ratio) group means of each passage, one behind the other.
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


def within(pooled: torch.Tensor, limit: float) -> torch.Tensor:
    """Return which rows of (G, d) have no NaN and no magnitude above the limit: (G,) bool."""
    return pooled.abs().amax(dim=1) <= limit  # amax keeps a NaN, which is not below any limit
