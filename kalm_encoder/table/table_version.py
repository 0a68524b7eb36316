"""One version of a table, whose columns are read by id, by a predicate or by full-text search.

It never writes. What a handle returns does not change while a job writes to the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import lance
import pyarrow as pa
import pyarrow.compute as pc
from lance.query import MatchQuery

from kalm_encoder.errors import CorruptRowError, InputError, first_line
from kalm_encoder.process import check_process
from kalm_encoder.table.ids import Id, as_ids, ids_in
from kalm_encoder.table.rows import read_metadata
from kalm_encoder.table.spec import TableSpec


class Member(NamedTuple):
    """A passage of a document.

    Attributes:
        id: Id of the passage.
        document: Id of its document; its own where the table names none.
        span: First character of the passage in the text of the document, and the one behind its
            last; None if the table does not say.
    """

    id: str
    document: str
    span: tuple[int, int] | None


class TableVersion:
    """One version of a passage table, open for reading.

    Attributes:
        uri: Address of the table.
        spec: What the table records about the model and the settings that made it.
        where: SQL predicate that all rows of this handle satisfy; None if it has all rows.
    """

    where: str | None = None

    def __init__(self, uri: str, dataset: lance.LanceDataset) -> None:
        self.uri = uri
        self._dataset = dataset
        self.spec = TableSpec.from_metadata(dataset.schema.metadata, uri)

    @property
    def dataset(self) -> lance.LanceDataset:
        """The Lance dataset of this version."""
        check_process()
        return self._dataset

    @property
    def version(self) -> int:
        """Number of the version that this handle reads."""
        return int(self.dataset.version)

    def __len__(self) -> int:
        return int(self.dataset.count_rows(self.where))

    def _visible(self, ids: Sequence[Id], column: str = "id") -> list[str]:
        """Return those ids that may be looked up in a column. `RestrictedTable` returns fewer."""
        return as_ids(ids)

    def known(self, ids: Sequence[Id], *, where: str | None = None) -> set[str]:
        """Return those ids that the table holds and whose rows satisfy `where`.

        Args:
            ids: Any ids.
            where: SQL predicate over the columns of the table. It is not checked here.

        Raises:
            InputError: If Lance cannot apply the predicate to the columns of this table.
        """
        if not (visible := self._visible(ids)):
            return set()
        wanted = ids_in(visible)
        if where is None:
            return set(self._scan(["id"], wanted)["id"].to_pylist())
        found = self.dataset.scanner(columns=[], with_row_id=True, filter=wanted).to_table()
        if not len(found):
            return set()
        rows = f"_rowid IN ({', '.join(map(str, found['_rowid'].to_pylist()))}) AND ({where})"
        # Lance accepts a filter on _rowid only if the scan also returns the row id.
        kept = self._scan(["id"], rows, where=where, with_row_id=True)
        return set(kept["id"].to_pylist())

    def check_filter(self, where: str) -> None:
        """Refuse a predicate that Lance cannot apply to the columns of this table.

        Raises:
            InputError: The message says why.
        """
        try:
            self.dataset.scanner(columns=["id"], filter=where).explain_plan()
        except (OSError, ValueError) as error:
            raise InputError(f"the filter {where!r} is refused: {first_line(error)}") from error

    def texts(self, ids: Sequence[Id]) -> dict[str, str]:
        """Return the stored texts by id, or nothing if the table keeps no texts."""
        if not self.spec.keep_text:
            return {}
        rows = self._scan(["id", "text"], ids_in(self._visible(ids)))
        return dict(zip(rows["id"].to_pylist(), rows["text"].to_pylist(), strict=True))

    def metadata(self, ids: Sequence[Id]) -> dict[str, dict[str, Any]]:
        """Return the metadata of passages by id, verified; of each a value by column.

        Raises:
            CorruptRowError: If the metadata of a row are not what was written.
        """
        rows = self._scan(["id", *self.spec.metadata_names], ids_in(self._visible(ids)))
        metadata = read_metadata(self.spec, rows, uri=self.uri)
        if metadata is None:
            return {}
        return dict(zip(rows["id"].to_pylist(), metadata.to_pylist(), strict=True))

    def members(self, ids: Sequence[Id], column: str) -> list[Member]:
        """Return the passages that have one of these ids, or belong to a document that has one.

        Args:
            ids: Ids of passages, of documents, or of both.
            column: Metadata column that names the document of a passage.

        Returns:
            The passages that the table holds, those of a document in their order in it.

        Raises:
            InputError: If the table has no such column of strings.
        """
        if dict(self.spec.metadata_columns).get(column) != "string":
            names = ", ".join(n for n, t in self.spec.metadata_columns if t == "string") or "none"
            raise InputError(
                f"{self.uri} has no metadata column {column!r} of strings to group by (it has "
                f"{names}): encode with --split, which makes doc_id, or with --keep {column}"
            )
        spans = ["span_begin", "span_end"] if self.spec.split else []
        passages, documents = self._visible(ids), self._visible(ids, column)
        if not (passages or documents):
            return []
        named = pc.field(column).isin(pa.array(documents, pa.string()))
        rows = self._scan(["id", column, *spans], ids_in(passages) | named).to_pylist()
        visible = set(self._visible([row["id"] for row in rows]))
        found = [
            Member(
                row["id"],
                row["id"] if row[column] is None else row[column],
                (row["span_begin"], row["span_end"]) if spans else None,
            )
            for row in rows
            if row["id"] in visible
        ]
        return sorted(found, key=lambda m: (m.document, m.span or (), m.id))

    def lengths(self, ids: Sequence[Id]) -> dict[str, tuple[int, bool]]:
        """Return (num_tokens, truncated) by id for those ids that the table holds."""
        rows = self._scan(["id", "num_tokens", "truncated"], ids_in(self._visible(ids)))
        facts = zip(rows["num_tokens"].to_pylist(), rows["truncated"].to_pylist(), strict=True)
        return dict(zip(rows["id"].to_pylist(), facts, strict=True))

    def _scan(
        self,
        columns: list[str],
        wanted: pc.Expression | str | None,
        *,
        where: str | None = None,
        **how: Any,
    ) -> pa.Table:
        """Read columns of the wanted rows; `where` is what a caller gave, and may be at fault."""
        try:
            return self.dataset.scanner(columns=columns, filter=wanted, **how).to_table()
        except (OSError, ValueError) as error:
            if where is not None:
                raise InputError(f"the filter {where!r} is refused: {first_line(error)}") from error
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> CorruptRowError:
        return CorruptRowError(
            f"{self.uri} cannot be read: {first_line(error)}. `kalm verify {self.uri}` says which "
            "rows are damaged"
        )

    def search(
        self, query: str, limit: int, *, where: str | None = None
    ) -> list[tuple[str, float]]:
        """Find passages by full-text search (BM25) over the stored text: a first stage.

        Args:
            query: Raw text.
            limit: Most passages to find.
            where: SQL predicate over the columns of the table. Only passages that satisfy it are
                searched, so that `limit` of them are found if there are so many.

        Returns:
            At most `limit` (id, BM25 score), best first, ties by id.

        Raises:
            InputError: The table keeps no text, `limit` is below 1, or Lance cannot apply the
                predicate to the columns of this table.
        """
        if not self.spec.keep_text:
            raise InputError(
                f"{self.uri} stores no text, so it cannot be searched: encode without --no-text, "
                "or give the ids of another first stage"
            )
        if limit < 1:
            raise InputError(f"cannot search for the best {limit}: give 1 or more")
        both = " AND ".join(f"({one})" for one in (self.where, where) if one) or None
        how: dict[str, Any] = {"limit": limit, "prefilter": both is not None}
        how["full_text_query"] = MatchQuery(query, "text")
        hits = self._scan(["id", "_score"], both, where=where, **how)
        pairs = zip(hits["id"].to_pylist(), hits["_score"].to_pylist(), strict=True)
        return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
