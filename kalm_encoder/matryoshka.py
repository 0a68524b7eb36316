"""Matryoshka Embedding Pooling: token states become group means, and group means coarser ones.

These are pure functions over arrays; they know nothing of tokenizers, models or storage. `ratio` is
the paper's r (arXiv 2606.22807, section on MEP); the published code calls it `chunk_size`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kalm_encoder.errors import InputError

Count = TypeVar("Count", int, NDArray[np.int64])


@dataclass(frozen=True, slots=True)
class PassageStates:
    """One encoded passage.

    Attributes:
        states: Group means, (m, d) with m = ceil(num_tokens / ratio). They are float32 from the
            encoder, and of the store's dtype from a table.
        num_tokens: Number of encoded tokens, with the prefix and after truncation; exact coarsening
            needs it.
        truncated: Whether the passage was longer than the encoder's max_length.
        content: First half of the hash of the text, if they come from a table. Passages of one
            table with the same content have the same text.
    """

    states: NDArray[np.floating]
    num_tokens: int
    truncated: bool
    content: int | None = None


@dataclass(frozen=True, slots=True)
class PackedStates:
    """Encoded passages, one behind the other, so that a step works on all of them at once.

    Attributes:
        states: Group means of all passages, (G, d).
        num_tokens: Number of tokens of each passage, (b,).
        truncated: Whether each passage was longer than the encoder's max_length, (b,) bool.
    """

    states: NDArray[np.floating]
    num_tokens: NDArray[np.int64]
    truncated: NDArray[np.bool_]

    @classmethod
    def of(cls, passages: Sequence[PassageStates]) -> PackedStates:
        """Pack passages of one ratio; there is at least one."""
        return cls(
            np.concatenate([p.states for p in passages]),
            np.array([p.num_tokens for p in passages]),
            np.array([p.truncated for p in passages]),
        )

    @classmethod
    def join(cls, parts: Sequence[PackedStates]) -> PackedStates:
        """Pack the passages of several parts, at least one, in their order."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([part.states for part in parts]),
            np.concatenate([part.num_tokens for part in parts]),
            np.concatenate([part.truncated for part in parts]),
        )

    def select(self, chosen: NDArray[np.bool_], ratio: int) -> PackedStates:
        """Return the chosen passages; `ratio` is that of the states, `chosen` is (b,)."""
        if chosen.all():
            return self
        groups = np.repeat(chosen, num_groups(self.num_tokens, ratio))
        return PackedStates(self.states[groups], self.num_tokens[chosen], self.truncated[chosen])

    def unpack(self, ratio: int) -> list[PassageStates]:
        """Return a copy of each passage by itself; `ratio` is that of the states."""
        ends = num_groups(self.num_tokens, ratio).cumsum()
        facts = zip(self.num_tokens.tolist(), self.truncated.tolist(), strict=True)
        parts = zip(np.split(self.states, ends[:-1]), facts, strict=True)
        return [PassageStates(states.copy(), n, truncated) for states, (n, truncated) in parts]


def num_groups(num_tokens: Count, ratio: int) -> Count:
    """Return ceil(num_tokens / ratio), the number of stored vectors of a passage or of each."""
    return -(-num_tokens // ratio)


def coarsen(
    pooled: NDArray[np.floating], num_tokens: int | NDArray[np.int64], stored: int, wanted: int
) -> NDArray[np.floating]:
    """Turn group means at ratio `stored` into exact group means at ratio `wanted`.

    Each stored mean is weighted by its number of tokens: the last group of a passage may be short,
    and a plain mean of means would be wrong there.

    Args:
        pooled: Group means of one passage or of several, one behind the other, (G, d): there are
            ceil(n / stored) of a passage with n tokens.
        num_tokens: Number of tokens of the passage, or of each passage, (b,).
        stored: Ratio of `pooled`.
        wanted: A multiple of `stored`.

    Returns:
        ceil(n / wanted) means of each passage, one behind the other, in float32; or `pooled` itself
        if the ratios are equal.

    Raises:
        InputError: If `wanted` is no multiple of `stored`, or `pooled` does not fit `num_tokens`.

    Example: The means 1.5, 3.5, 5.0 of 5 tokens at ratio 2 become (2*1.5 + 2*3.5) / 4 = 2.5 and 5.0
    at ratio 4.
    """
    if wanted < stored or wanted % stored:
        raise InputError(f"ratio {wanted} is not a multiple of the stored ratio {stored}")
    sizes = np.atleast_1d(np.asarray(num_tokens, np.int64))
    groups = num_groups(sizes, stored)
    ends = groups.cumsum()
    if len(pooled) != groups.sum():
        raise InputError(
            f"{len(pooled)} states cannot belong to {num_tokens} tokens at ratio {stored}"
        )
    if wanted == stored:
        return pooled
    weights = np.full((len(pooled), 1), stored, dtype=np.float32)
    weights[ends - 1, 0] = sizes - stored * (groups - 1)
    places = np.arange(len(pooled)) - np.repeat(ends - groups, groups)  # in their passage
    starts = np.flatnonzero(places % (wanted // stored) == 0)
    sums = np.add.reduceat(pooled.astype(np.float32) * weights, starts, axis=0)
    return sums / np.add.reduceat(weights, starts, axis=0)
