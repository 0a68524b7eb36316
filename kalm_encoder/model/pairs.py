"""A query, a passage, and what a batch of them is on the device."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kalm_encoder.model.decoder_forward import KeptMemory, PassageMemory

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Prompt:
    """A query as the decoder reads it.

    Attributes:
        ids: token ids.
        prefix: how many of them every query with this instruction begins with.
    """

    ids: tuple[int, ...]
    prefix: int


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt against one passage.

    Attributes:
        prompt: the query.
        passage: (m, d) states, m >= 1, or what `QueryDecoder.recall` returned.
        key: names the passage (its table, ratio and id) so that it can be recalled; None: never.
    """

    prompt: Prompt
    passage: NDArray[np.floating] | torch.Tensor
    key: Hashable = None

    @property
    def held(self) -> int:
        """Prompt tokens that need no forward: they are in what was recalled."""
        return self.prompt.prefix if isinstance(self.passage, torch.Tensor) else 0

    @property
    def num_states(self) -> int:
        """States of the passage, m."""
        return int(self.passage.shape[2 if self.held else 0]) - self.held

    @property
    def size(self) -> int:
        """Prompt tokens to compute and states, what a token budget counts."""
        return len(self.prompt.ids) - self.held + self.num_states


def memory_of(
    pairs: Sequence[Pair], device: torch.device, dtype: torch.dtype
) -> PassageMemory | KeptMemory:
    """Return the passages of a batch: recalled entries, or states padded to one length.

    Args:
        pairs: all recalled or none.
        device: of the decoder.
        dtype: of the decoder.
    """
    lengths = [pair.held + pair.num_states for pair in pairs]
    longest = max(lengths)
    alike = min(lengths) == longest
    real = torch.arange(longest) < torch.tensor(lengths[:1] if alike else lengths).unsqueeze(1)
    real = real.to(device)
    entries = [pair.passage for pair in pairs if isinstance(pair.passage, torch.Tensor)]
    if entries:
        return KeptMemory(entries, pairs[0].prompt.prefix, real)
    shape = (len(pairs), longest, pairs[0].passage.shape[1])
    padded = np.zeros(shape, dtype=pairs[0].passage.dtype)  # type: ignore[arg-type]
    for row, pair in zip(padded, pairs, strict=True):
        row[: len(pair.passage)] = pair.passage
    states = torch.from_numpy(padded)
    if device.type == "cuda":
        states = states.pin_memory()
    return PassageMemory(states.to(device, non_blocking=True).to(dtype), real)
