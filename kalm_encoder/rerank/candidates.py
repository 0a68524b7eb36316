"""Pairs a prompt with candidates whose states are given, kept by the decoder, or in the table."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

from cachetools import LRUCache

from kalm_encoder.errors import MissingIdsError
from kalm_encoder.matryoshka import PassageStates, coarsen
from kalm_encoder.model.decoder import QueryDecoder
from kalm_encoder.model.pairs import Pair, Prompt
from kalm_encoder.table.reader import PassageTable

REMEMBERED_IDS = 1 << 16
"""Number of ids whose content is known without reading: more than a decoder keeps passages."""

Candidate = tuple[Hashable, Pair]
"""A key that candidates with the same text share, and the pair to score."""


class CandidateReader:
    """Makes pairs of the passages of a table. Threads may share it.

    Passages with the same text have one key, so they are scored once and kept once. Their states
    alone would not tell, because they differ in their last bits if they were encoded in different
    batches.

    Args:
        table: The open table.
        decoder: Decoder that keeps passages.
    """

    def __init__(self, table: PassageTable, decoder: QueryDecoder) -> None:
        self._table = table
        self._decoder = decoder
        self._contents: LRUCache[str, int | None] = LRUCache(REMEMBERED_IDS)
        self._lock = threading.Lock()
        self._reader = ThreadPoolExecutor(4, thread_name_prefix="kalm-read")

    def of(self, table: PassageTable) -> CandidateReader:
        """Return a reader of another table, for the same decoder and with the same threads."""
        other = CandidateReader(table, self._decoder)
        other._reader = self._reader
        return other

    def read_ahead(
        self,
        prompt: Prompt,
        chunks: Sequence[Sequence[str]],
        ratio: int,
        given: Mapping[str, PassageStates],
    ) -> Iterator[tuple[Sequence[str], dict[str, Candidate]]]:
        """Yield each chunk of ids and its candidates; the next is read while the caller works."""
        reads = (
            # In a copy of this context, so that the span of what is read belongs to the request.
            self._reader.submit(copy_context().run, self.read, prompt, ids, ratio, given)
            for ids in chunks
        )
        ahead = next(reads, None)
        for ids in chunks:
            found = ahead.result() if ahead is not None else {}
            ahead = next(reads, None)
            yield ids, found

    def read(
        self, prompt: Prompt, ids: Sequence[str], ratio: int, given: Mapping[str, PassageStates]
    ) -> dict[str, Candidate]:
        """Return the candidates that are given or that the table holds, in the order of the ids."""
        found: dict[str, Candidate] = {}
        with self._lock:
            contents = {i: self._contents.get(i) for i in ids}
        for i in ids:
            if i in given:
                finest = self._table.spec.ratios[0]
                states = coarsen(given[i].states, given[i].num_tokens, finest, ratio)
                found[i] = i, Pair(prompt, states)
            elif contents[i] is not None:
                key = self._key(i, contents[i], ratio)
                if (entry := self._decoder.recall(prompt, key)) is not None:
                    found[i] = key, Pair(prompt, entry, key)
        read = self._table.find([i for i in ids if i not in found], ratio=ratio)
        for i, passage in read.items():
            key = self._key(i, passage.content, ratio)
            found[i] = key, Pair(prompt, passage.states, key)
        with self._lock:
            self._contents.update((i, passage.content) for i, passage in read.items())
        return {i: found[i] for i in ids if i in found}

    def missing(self, ids: Sequence[str], given: Mapping[str, PassageStates]) -> MissingIdsError:
        """Return the error that names all ids that are neither given nor in the table."""
        known = self._table.known([i for i in ids if i not in given]) | given.keys()
        missing = [i for i in ids if i not in known]
        remedy = "leave them out with on_missing='drop', or rank them last with on_missing='last'"
        return MissingIdsError(missing, self._table.uri, remedy)

    def _key(self, id: str, content: int | None, ratio: int) -> Hashable:
        """Return the name under which the decoder keeps a passage of this table."""
        same = id if content is None else content
        # Under another predicate it is kept again: otherwise the time would tell that somebody
        # else asked for a passage with this text.
        return self._table.uri, self._table.version, self._table.where, ratio, same
