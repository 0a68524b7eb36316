"""Reads the states of passages from one version of a table. This module knows nothing of torch."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from kalm_encoder import tracing
from kalm_encoder.errors import InputError, MissingIdsError, TableError, first_line
from kalm_encoder.matryoshka import PassageStates
from kalm_encoder.table import hub
from kalm_encoder.table.cache.disk_cache import DiskCache
from kalm_encoder.table.cache.read_through import CachedStates
from kalm_encoder.table.ids import Id, as_ids, ids_in
from kalm_encoder.table.location import Location
from kalm_encoder.table.row_index import ADDRESS, RowIndex, TextOrder, with_states
from kalm_encoder.table.rows import read_rows, verified_rows
from kalm_encoder.table.table_version import TableVersion
from kalm_encoder.table.text_ids import TextIds

logger = logging.getLogger(__name__)
LIVE_TAG = "live"
"""Tag that names the newest complete version. A job moves it as its last step."""


class PassageTable(TableVersion):
    """One version of a passage table, open for reading.

    Attributes:
        index: Index of the rows in memory, or None if it was not wanted or is too large.
        by_text: The ids of their texts, or None if these were not wanted.
        cached: States of this version in a cache on the local disk, or None if there is none.
    """

    index: RowIndex | None = None
    by_text: TextIds | None = None
    cached: CachedStates | None = None

    @classmethod
    def open(
        cls,
        uri: str | os.PathLike[str],
        *,
        version: int | str | None = None,
        storage_options: dict[str, str] | None = None,
        index_bytes: int = 0,
        match_text: bool = False,
        disk_cache: DiskCache | None = None,
    ) -> PassageTable:
        """Open a table.

        Args:
            uri: Local path or object store URL of the Lance table, or hf://datasets/… of one that
                `kalm push` has uploaded; that one is copied to this machine.
            version: A version number or tag; None takes the tag `live`, which only a complete
                table has.
            storage_options: Storage options of Lance, such as aws_endpoint.
            index_bytes: Most memory for an index of the rows (see `load_index`); 0 makes none.
            match_text: Whether `ids_by_text` is wanted. It needs the index, for which 0 is then no
                limit.
            disk_cache: Cache of states on the local disk, for a table on an object store.

        Raises:
            TableError: If there is no such table or version, or no job has completed it.
            InputError: If texts are to be matched and the index would be larger than the limit.
            CorruptRowError: If the index cannot be read.
        """
        shown = None
        if hub.is_on_hub(os.fspath(uri)):
            uri, shown = hub.download(os.fspath(uri))
        location = Location(os.fspath(uri), storage_options)
        uri, dataset = shown or location.uri, location.dataset()
        try:
            if version is None and LIVE_TAG not in dataset.tags.list():
                raise TableError(
                    f"{uri} is not complete yet: run the same `kalm encode` again until it says "
                    "so, or name a version to read what is there"
                )
            at = dataset.checkout_version(LIVE_TAG if version is None else version)
        except (ValueError, OSError) as error:
            raise TableError(f"{uri} has no version {version!r}: {first_line(error)}") from error
        table = cls(uri, at)
        if index_bytes or match_text:
            table.load_index(index_bytes or sys.maxsize, match_text=match_text)
        if disk_cache is not None:
            table.use_disk_cache(disk_cache, storage_options)
        return table

    def index_size(self, max_bytes: int, *, match_text: bool) -> int:
        """Return the bytes that an index of the rows takes.

        Raises:
            InputError: If texts are to be matched and these are more than `max_bytes`.
        """
        rows = len(self)
        size = RowIndex.size(rows, self.spec.ratios)
        if not match_text:
            return size
        if (size := size + TextOrder.size(rows)) > max_bytes:
            raise InputError(
                f"to find passages by their texts, the {rows} rows of {self.uri} must be indexed "
                f"in memory. That takes {size / 2**20:.1f} MB and the limit is "
                f"{max_bytes / 2**20:.1f} MB: give --index-mb {-(-size // 2**20)} "
                f"(index_bytes={size} in Python), or leave --match-text out"
            )
        return size

    def load_index(self, max_bytes: int, *, match_text: bool = False) -> None:
        """Index the rows in memory, so that `take` reads nothing but states; see row_index.py.

        This reads the small columns once, which takes 0.2 to 0.5 s per million rows on a local
        disk. If the index would be larger than `max_bytes`, the log says so and none is made.

        Args:
            max_bytes: Most memory for it.
            match_text: Whether rows are found by their texts too.

        Raises:
            CorruptRowError: If the small columns cannot be read.
            InputError: If texts are to be matched and the index would be larger than the limit.
        """
        began, rows = time.monotonic(), len(self)
        if (size := self.index_size(max_bytes, match_text=match_text)) > max_bytes:
            logger.warning(
                "an index of %d rows takes %.1f MB of memory and the limit is %.1f MB: rows are "
                "looked up on disk",
                *(rows, size / 2**20, max_bytes / 2**20),
            )
            return
        try:
            self.index = RowIndex.build(self.dataset, self.spec.ratios)
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error
        if match_text:
            self.by_text = TextIds(TextOrder.of(self.index))
        seconds = time.monotonic() - began
        logger.info("%d rows indexed in memory: %.1f MB, %.1f s", rows, size / 2**20, seconds)

    def use_disk_cache(
        self, cache: DiskCache, storage_options: dict[str, str] | None = None
    ) -> None:
        """Read states through a cache on the local disk; see cache/disk_cache.py.

        What was kept of the table before an erasure is dropped first. With the index in memory, a
        row whose states are in the cache needs no request to the store. Without it, the small
        columns are read first.

        Args:
            cache: The cache, which other tables and processes may share.
            storage_options: Storage options of Lance, with which the table was opened.

        Raises:
            KalmError: If the erasures of the table cannot be read.
        """
        location = Location(self.uri, storage_options)
        self.cached = CachedStates(cache, location, self.version, self.spec)

    def take(self, ids: Sequence[Id], *, ratio: int | None = None) -> list[PassageStates]:
        """Read passages by id and verify their checksums.

        Args:
            ids: Ids in any order; they may repeat. An integer stands for its decimal string.
            ratio: Any multiple of a stored ratio. The coarsest stored column that fits is read and
                coarsened exactly. None takes the finest stored ratio.

        Returns:
            One PassageStates per id, in the order of the ids.

        Raises:
            MissingIdsError: If the table does not hold some ids; it names all of them.
            InputError: If the ratio cannot be made from what is stored.
            CorruptRowError: If the bytes of a row are not what was written.
        """
        wanted = as_ids(ids)
        found = self.find(wanted, ratio=ratio)
        if missing := [i for i in dict.fromkeys(wanted) if i not in found]:
            raise MissingIdsError(missing, self.uri)
        return [found[i] for i in wanted]

    def find(self, ids: Sequence[Id], *, ratio: int | None = None) -> dict[str, PassageStates]:
        """Read those of the passages that the table holds, as `take` does; return them by id."""
        ratio = self.spec.ratios[0] if ratio is None else ratio
        stored = self.spec.source_ratio(ratio)
        with tracing.span("take", {"kalm.ratio": ratio, "kalm.ratio.stored": stored}) as span:
            rows, left = self._located(list(dict.fromkeys(self._visible(ids))), stored)
            found: dict[str, PassageStates] = {}
            if len(rows):
                if self.cached is None:
                    whole = self._with_states(rows, stored)
                else:
                    fetch = partial(self._with_states, stored=stored)
                    whole = self.cached.read(rows, stored, fetch)
                read = verified_rows(self.spec, whole, ratio)
                found = {key: passage for key, passage in read if passage is not None}
                left += [i for i in rows["id"].to_pylist() if i not in found]
            if left:
                columns = [*_small_columns(stored), f"states_r{stored}"]
                unsettled = self._scan(columns, ids_in(left))
                found |= read_rows(self.spec, unsettled, ratio, uri=self.uri)
            if span is not None:
                sizes = [self.spec.read_bytes(p.num_tokens, ratio) for p in found.values()]
                span.set_attributes({"kalm.rows": len(found), "kalm.bytes": sum(sizes)})
                span.set_attribute("kalm.rows.located", len(rows))
        return found

    def ids_by_text(self, texts: Iterable[str]) -> dict[str, str]:
        """Return the ids of those texts that the table holds, by text.

        A text is held if a row was encoded from exactly this text, title included. Nothing is read
        for a text that is not held, nor for one that was found before. If several rows hold one, it
        is the one whose id has the lowest hash, which is the same row in every version.

        Raises:
            InputError: If the table was opened without `match_text`, or a text is not valid
                Unicode.
            CorruptRowError: If the rows cannot be read.
        """
        if self.by_text is None:
            raise InputError(f"{self.uri} was opened without match_text: open it with it")
        return self.by_text.find(texts, self._scan)

    def _located(self, ids: list[str], stored: int) -> tuple[pa.Table, list[str]]:
        """Return addresses and small columns of rows, and the ids that it cannot settle.

        Such an id shares its hash with another one, or its row is there twice. The ordinary look-up
        tells which. Without an index, this look-up pays only if a cache may hold the states.
        """
        if self.index is not None:
            single, left = self.index.find(ids)
            return self.index.rows(single), left
        if self.cached is None or not ids:
            return pa.table({"id": []}), ids
        rows = self._scan([*_small_columns(stored), ADDRESS], ids_in(ids)).combine_chunks()
        times = Counter(rows["id"].to_pylist())
        if left := [id for id, count in times.items() if count > 1]:
            rows = rows.filter(~pc.field("id").isin(left))
        return rows, left

    def _with_states(self, rows: pa.Table, stored: int) -> pa.Table:
        """Read the states of rows by address; a row that is damaged may be left out."""
        if (span := tracing.current()) is not None:  # the others come from the cache on the disk
            span.set_attribute("kalm.rows.fetched", len(rows))
        addresses = ", ".join(map(str, rows[ADDRESS].to_pylist()))
        states = self._scan([f"states_r{stored}", ADDRESS], f"{ADDRESS} IN ({addresses})")
        return with_states(rows, states)


def _small_columns(stored: int) -> list[str]:
    """Return the columns that are read beside the states of a stored ratio."""
    return ["id", "num_tokens", "truncated", "text_hash", f"checksum_r{stored}"]
