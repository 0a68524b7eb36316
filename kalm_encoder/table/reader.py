"""Reads passages from one version of a table; it never writes.

What a handle returns does not change while a job writes to the table. This module knows nothing of
torch.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence

import lance
import pyarrow as pa
import pyarrow.compute as pc
from lance.query import MatchQuery

from kalm_encoder.errors import CorruptRowError, InputError, MissingIdsError, TableError, first_line
from kalm_encoder.matryoshka import PassageStates
from kalm_encoder.process import check_process
from kalm_encoder.table.ids import Id, as_ids, ids_in
from kalm_encoder.table.location import Location
from kalm_encoder.table.row_index import ADDRESS, RowIndex
from kalm_encoder.table.rows import read_rows, verified_rows
from kalm_encoder.table.spec import TableSpec

logger = logging.getLogger(__name__)
LIVE_TAG = "live"
"""Tag that names the newest complete version. A job moves it as its last step."""


class PassageTable:
    """One version of a passage table, open for reading.

    Attributes:
        uri: Address of the table.
        spec: What the table records about the model and the settings that made it.
        index: Index of the rows in memory, or None if it was not wanted or is too large.
    """

    def __init__(self, uri: str, dataset: lance.LanceDataset) -> None:
        self.uri = uri
        self._dataset = dataset
        self.index: RowIndex | None = None
        self.spec = TableSpec.from_metadata(dataset.schema.metadata, uri)

    @classmethod
    def open(
        cls,
        uri: str | os.PathLike[str],
        *,
        version: int | str | None = None,
        storage_options: dict[str, str] | None = None,
        index_bytes: int = 0,
    ) -> PassageTable:
        """Open a table.

        Args:
            uri: Local path or object store URL of the Lance table.
            version: A version number or tag; None takes the tag `live`, which only a complete
                table has.
            storage_options: Storage options of Lance, such as aws_endpoint.
            index_bytes: Most memory for an index of the rows (see `load_index`); 0 makes none.

        Raises:
            TableError: If there is no such table or version, or no job has completed it.
            CorruptRowError: If the index cannot be read.
        """
        location = Location(os.fspath(uri), storage_options)
        uri, dataset = location.uri, location.dataset()
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
        if index_bytes:
            table.load_index(index_bytes)
        return table

    @property
    def dataset(self) -> lance.LanceDataset:
        """The Lance dataset of this version."""
        check_process()
        return self._dataset

    def load_index(self, max_bytes: int) -> None:
        """Index the rows in memory, so that `take` reads nothing but states; see row_index.py.

        This reads the small columns once, which takes 0.2 to 0.5 s per million rows on a local
        disk. If the index would be larger than `max_bytes`, the log says so and none is made.

        Raises:
            CorruptRowError: If the small columns cannot be read.
        """
        began, rows = time.monotonic(), len(self)
        if (size := RowIndex.size(rows, self.spec.ratios)) > max_bytes:
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
        seconds = time.monotonic() - began
        logger.info("%d rows indexed in memory: %.1f MB, %.1f s", rows, size / 2**20, seconds)

    @property
    def version(self) -> int:
        """Number of the version that this handle reads."""
        return int(self.dataset.version)

    def __len__(self) -> int:
        return int(self.dataset.count_rows())

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
        found, left = self._take_indexed(list(dict.fromkeys(as_ids(ids))), ratio)
        if left:
            columns = ["id", "num_tokens", "truncated", "text_hash"]
            columns += [f"states_r{stored}", f"checksum_r{stored}"]
            found |= read_rows(self.spec, self._scan(columns, ids_in(left)), ratio, uri=self.uri)
        return found

    def _take_indexed(
        self, ids: Sequence[str], ratio: int
    ) -> tuple[dict[str, PassageStates], list[str]]:
        """Read passages through the index; return them and the ids that it cannot settle.

        Such an id shares its hash with another one, or its row is damaged. The ordinary look-up
        tells which.
        """
        if self.index is None:
            return {}, list(ids)
        single, left = self.index.find(ids)
        if not single:
            return {}, left
        addresses = ", ".join(map(str, self.index.columns[ADDRESS][list(single.values())]))
        column = f"states_r{self.spec.source_ratio(ratio)}"
        states = self._scan([column, ADDRESS], f"{ADDRESS} IN ({addresses})")
        read = verified_rows(self.spec, self.index.rows(states, single), ratio)
        found = {key: passage for key, passage in read if passage is not None}
        return found, left + [i for i in single if i not in found]

    def known(self, ids: Sequence[Id], *, where: str | None = None) -> set[str]:
        """Return those ids that the table holds and whose rows satisfy `where`.

        Args:
            ids: Any ids.
            where: SQL predicate over the columns of the table. It is not checked here.

        Raises:
            InputError: If Lance cannot apply the predicate to the columns of this table.
        """
        if where is None:
            return set(self._scan(["id"], ids_in(ids))["id"].to_pylist())
        found = self.dataset.scanner(columns=[], with_row_id=True, filter=ids_in(ids)).to_table()
        if not len(found):
            return set()
        rows = f"_rowid IN ({', '.join(map(str, found['_rowid'].to_pylist()))}) AND ({where})"
        try:
            # Lance accepts a filter on _rowid only if the scan also returns the row id.
            kept = self.dataset.scanner(columns=["id"], with_row_id=True, filter=rows).to_table()
        except (OSError, ValueError) as error:
            raise InputError(f"the filter {where!r} is refused: {first_line(error)}") from error
        return set(kept["id"].to_pylist())

    def texts(self, ids: Sequence[Id]) -> dict[str, str]:
        """Return the stored texts by id, or nothing if the table keeps no texts."""
        if not self.spec.keep_text:
            return {}
        rows = self._scan(["id", "text"], ids_in(ids))
        return dict(zip(rows["id"].to_pylist(), rows["text"].to_pylist(), strict=True))

    def lengths(self, ids: Sequence[Id]) -> dict[str, tuple[int, bool]]:
        """Return (num_tokens, truncated) by id for those ids that the table holds."""
        rows = self._scan(["id", "num_tokens", "truncated"], ids_in(ids))
        facts = zip(rows["num_tokens"].to_pylist(), rows["truncated"].to_pylist(), strict=True)
        return dict(zip(rows["id"].to_pylist(), facts, strict=True))

    def _scan(self, columns: list[str], wanted: pc.Expression | str) -> pa.Table:
        try:
            return self.dataset.scanner(columns=columns, filter=wanted).to_table()
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> CorruptRowError:
        return CorruptRowError(
            f"{self.uri} cannot be read: {first_line(error)}. `kalm verify {self.uri}` says which "
            "rows are damaged"
        )

    def search(self, query: str, limit: int) -> list[tuple[str, float]]:
        """Find passages by full-text search (BM25) over the stored text: a first stage.

        Returns:
            At most `limit` (id, BM25 score), best first, ties by id.

        Raises:
            InputError: the table keeps no text, or `limit` is below 1.
        """
        if not self.spec.keep_text:
            raise InputError(
                f"{self.uri} stores no text, so it cannot be searched: encode without --no-text, "
                "or give the ids of another first stage"
            )
        if limit < 1:
            raise InputError(f"cannot search for the best {limit}: give 1 or more")
        hits = self.dataset.scanner(
            columns=["id", "_score"], full_text_query=MatchQuery(query, "text"), limit=limit
        ).to_table()
        pairs = zip(hits["id"].to_pylist(), hits["_score"].to_pylist(), strict=True)
        return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
