"""A query paired with a passage, and the memory of passages that keep coming back.

With the same instructions, the keys and values of a prompt's beginning depend on nothing but the
passage, and so do the passage's own. Once they are kept, a repeated candidate costs only the tokens
of the query. This is a module of its own because decoder.py would be too long with it.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from cachetools import LRUCache
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from kalm_encoder.model.batching import send
from kalm_encoder.model.decoder_forward import KeptMemory, PassageMemory


@dataclass(frozen=True, slots=True)
class Prompt:
    """A query as the decoder reads it.

    Attributes:
        ids: Token ids.
        prefix: How many of the ids are common to all queries with these instructions.
    """

    ids: tuple[int, ...]
    prefix: int


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt and one passage.

    Attributes:
        prompt: The query.
        passage: (m, d) states with m >= 1, or the (prefix + m, layers, 2, kv heads, head_dim) that
            `QueryDecoder.recall` returned.
        key: Name of the passage (its table, ratio and id) under which it is kept. With None it is
            never kept.
    """

    prompt: Prompt
    passage: NDArray[np.floating] | torch.Tensor
    key: Hashable = None

    @property
    def held(self) -> int:
        """Number of prompt tokens that need no forward, because they were recalled."""
        return self.prompt.prefix if isinstance(self.passage, torch.Tensor) else 0

    @property
    def num_states(self) -> int:
        """Number of states of the passage, m."""
        return int(self.passage.shape[0]) - self.held

    @property
    def size(self) -> int:
        """Number of prompt tokens to compute plus states, which a token budget counts."""
        return len(self.prompt.ids) - self.held + self.num_states


def memory_of(
    pairs: Sequence[Pair], device: torch.device, dtype: torch.dtype
) -> PassageMemory | KeptMemory:
    """Return the passages of a batch: recalled entries, or states padded to one length.

    Args:
        pairs: Pairs that are all recalled, or of which none is.
        device: Device of the decoder.
        dtype: Dtype of the decoder.
    """
    lengths = [pair.held + pair.num_states for pair in pairs]
    longest = max(lengths)
    alike = min(lengths) == longest
    sizes = send(lengths[:1] if alike else lengths, device)
    real = torch.arange(longest, device=device) < sizes.unsqueeze(1)
    entries = [pair.passage for pair in pairs if isinstance(pair.passage, torch.Tensor)]
    arrays = [pair.passage for pair in pairs if not isinstance(pair.passage, torch.Tensor)]
    if entries:
        padded = pad_sequence(entries, batch_first=True)  # once for all layers
        return KeptMemory(padded, pairs[0].prompt.prefix, real)
    kinds = {array.dtype for array in arrays}
    stored = torch.from_numpy(np.empty(0, dtype=np.result_type(*kinds))).dtype
    shape = (len(pairs), longest, arrays[0].shape[1])
    states = torch.empty(shape, dtype=stored, pin_memory=device.type == "cuda")
    for row, array in zip(states.numpy(), arrays, strict=True):
        row[: len(array)], row[len(array) :] = array, 0
    return PassageMemory(states.to(device, non_blocking=True).to(dtype), real)


class HotPassages:
    """A bounded memory of passages. It drops the least recently used; threads may share it.

    Args:
        max_bytes: Limit of all entries together. A single entry that is larger is not kept.

    Attributes:
        hits: Number of look-ups that found an entry.
        misses: Number of look-ups that found none.
    """

    def __init__(self, max_bytes: int) -> None:
        self._entries: LRUCache[Hashable, torch.Tensor] = LRUCache(
            max_bytes, getsizeof=lambda entry: entry.nbytes
        )
        self._lock = threading.Lock()
        self.hits = 0
        self.misses = 0

    def __reduce__(self) -> tuple[type[HotPassages], tuple[int]]:
        """Pickle the limit alone: the copy holds nothing yet."""
        return HotPassages, (int(self._entries.maxsize),)

    @property
    def nbytes(self) -> int:
        """Number of bytes held now."""
        return int(self._entries.currsize)

    def get(self, key: Hashable) -> torch.Tensor | None:
        """Return the entry of a passage, or None."""
        with self._lock:
            entry = self._entries.get(key)
            self.hits += entry is not None
            self.misses += entry is None
            return entry

    def put(self, key: Hashable, entry: torch.Tensor) -> None:
        """Keep an entry, and drop older ones if they leave no room for it."""
        with self._lock:
            if entry.nbytes <= self._entries.maxsize:
                self._entries[key] = entry
