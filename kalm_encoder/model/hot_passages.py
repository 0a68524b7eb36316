"""A bounded memory of passages that keep coming back.

With one instruction, the keys and values of a prompt's beginning depend on nothing but the passage,
and so do the passage's own. Kept, a repeated candidate costs only the query's own tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable

import torch
from cachetools import LRUCache


class HotPassages:
    """Least recently used entries go first. Safe to share between threads.

    Args:
        max_bytes: of all entries together; an entry above it is not kept.

    Attributes:
        hits: look-ups that found an entry.
        misses: look-ups that did not.
    """

    def __init__(self, max_bytes: int) -> None:
        self._entries: LRUCache[Hashable, torch.Tensor] = LRUCache(
            max_bytes, getsizeof=lambda entry: entry.nbytes
        )
        self._lock = threading.Lock()
        self.hits = 0
        self.misses = 0

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return int(self._entries.currsize)

    def get(self, key: Hashable) -> torch.Tensor | None:
        """Return the entry of a passage, or None."""
        with self._lock:
            entry = self._entries.get(key)
            self.hits += entry is not None
            self.misses += entry is None
            return entry

    def put(self, key: Hashable, entry: torch.Tensor) -> None:
        """Keep an entry, dropping older ones where the room is needed."""
        with self._lock:
            if entry.nbytes <= self._entries.maxsize:
                self._entries[key] = entry
