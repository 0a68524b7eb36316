"""Reads a passage table: which version, which rows, which ratio. Never writes one.

One handle is one version: what it returns does not change while a job writes. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import lance
import pyarrow as pa
import pyarrow.compute as pc
from lance.query import MatchQuery

from kalm_encoder.errors import CorruptRowError, InputError, MissingIdsError, TableError
from kalm_encoder.pooling import PassageStates
from kalm_encoder.rows import TableSpec, read_rows

LIVE_TAG = "live"
"""The tag that names the newest complete version; a job moves it last."""


class PassageTable:
    """One version of a passage table, open for reading.

    Attributes:
        uri: where it is.
        spec: what it records of the model and settings that made it.
        dataset: the Lance dataset behind it.
    """

    def __init__(self, uri: str, dataset: lance.LanceDataset) -> None:
        self.uri = uri
        self.dataset = dataset
        self.spec = TableSpec.from_metadata(dataset.schema.metadata, uri)

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        version: int | str | None = None,
        storage_options: dict[str, str] | None = None,
    ) -> PassageTable:
        """Open a table.

        Args:
            uri: local path or object store URL of the Lance table.
            version: a version number or tag; None takes the tag `live`, which only a complete
                table has.
            storage_options: as Lance takes them, such as aws_endpoint.

        Raises:
            TableError: no such table or version, or a job has not completed it.
        """
        dataset = open_dataset(uri, storage_options)
        try:
            if version is None and LIVE_TAG not in dataset.tags.list():
                raise TableError(
                    f"{uri} is not complete yet: run the same `kalm encode` again until it says "
                    "so, or name a version to read what is there"
                )
            at = dataset.checkout_version(LIVE_TAG if version is None else version)
        except (ValueError, OSError) as error:
            raise TableError(f"{uri} has no version {version!r}: {first_line(error)}") from error
        return cls(uri, at)

    @property
    def version(self) -> int:
        """Version number this handle reads."""
        return int(self.dataset.version)

    def __len__(self) -> int:
        return int(self.dataset.count_rows())

    def take(self, ids: Sequence[str], *, ratio: int | None = None) -> list[PassageStates]:
        """Read passages by id, checksums verified.

        Args:
            ids: in any order; one may repeat.
            ratio: any multiple of a stored ratio; the coarsest stored column that fits is read
                and coarsened exactly. None takes the finest stored.

        Returns:
            One PassageStates an id, in the order asked for.

        Raises:
            MissingIdsError: names all ids the table does not hold.
            InputError: the ratio cannot be made from what is stored.
            CorruptRowError: a row's bytes are not what was written.
        """
        stored = self.spec.source_ratio(ratio)
        columns = ["id", "num_tokens", "truncated", f"states_r{stored}", f"checksum_r{stored}"]
        unique = list(dict.fromkeys(ids))
        if not unique:
            return []
        rows = self._scan(columns, ids_in(unique))
        found = read_rows(self.spec, rows, stored=stored, wanted=ratio or stored, uri=self.uri)
        if missing := [i for i in unique if i not in found]:
            raise MissingIdsError(missing, self.uri)
        return [found[i] for i in ids]

    def known(self, ids: Sequence[str], *, where: str | None = None) -> set[str]:
        """Return those ids that the table holds, and whose rows satisfy `where`.

        Args:
            ids: any strings.
            where: SQL predicate over the table's columns, trusted.

        Raises:
            InputError: the predicate cannot be applied to this table's columns.
        """
        if where is None:
            return set(self._scan(["id"], ids_in(ids))["id"].to_pylist())
        found = self.dataset.scanner(columns=[], with_row_id=True, filter=ids_in(ids)).to_table()
        if not len(found):
            return set()
        rows = f"_rowid IN ({', '.join(map(str, found['_rowid'].to_pylist()))}) AND ({where})"
        try:
            # Lance plans this filter only where the row id is asked for, too.
            kept = self.dataset.scanner(columns=["id"], with_row_id=True, filter=rows).to_table()
        except (OSError, ValueError) as error:
            raise InputError(f"the filter {where!r} is refused: {first_line(error)}") from error
        return set(kept["id"].to_pylist())

    def texts(self, ids: Sequence[str]) -> dict[str, str]:
        """Return stored texts by id; empty where the table keeps none."""
        if not self.spec.keep_text:
            return {}
        rows = self._scan(["id", "text"], ids_in(ids))
        return dict(zip(rows["id"].to_pylist(), rows["text"].to_pylist(), strict=True))

    def lengths(self, ids: Sequence[str]) -> dict[str, tuple[int, bool]]:
        """Return (num_tokens, truncated) by id, of those ids that the table holds."""
        rows = self._scan(["id", "num_tokens", "truncated"], ids_in(ids))
        facts = zip(rows["num_tokens"].to_pylist(), rows["truncated"].to_pylist(), strict=True)
        return dict(zip(rows["id"].to_pylist(), facts, strict=True))

    def _scan(self, columns: list[str], wanted: pc.Expression) -> pa.Table:
        try:
            return self.dataset.scanner(columns=columns, filter=wanted).to_table()
        except (OSError, ValueError) as error:
            raise CorruptRowError(
                f"{self.uri} cannot be read: {first_line(error)}. `kalm verify {self.uri}` says "
                "which rows are damaged"
            ) from error

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


def ids_in(ids: Sequence[str]) -> pc.Expression:
    """Return the filter for rows of these ids; an expression, so that any id is safe in it."""
    return pc.field("id").isin(pa.array(ids, pa.string()))


def open_dataset(uri: str, storage_options: dict[str, str] | None) -> lance.LanceDataset:
    """Open the latest version of a Lance dataset.

    Raises:
        TableError: nothing there, or the store refused.
    """
    try:
        return lance.dataset(uri, storage_options=storage_options)
    except (ValueError, OSError) as error:
        raise TableError(f"no passage table at {uri}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an engine's message, without its source location."""
    text = str(error).strip().splitlines()
    return text[0].split(", /home/")[0].split(", rust/")[0] if text else type(error).__name__
