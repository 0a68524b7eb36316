"""Checks ranges of rows on the workers, and hashes their ids into partitions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from kalm_encoder.table.checksums import row_checksum, text_hash
from kalm_encoder.table.location import Location
from kalm_encoder.table.metadata import damaged_metadata
from kalm_encoder.table.reader import PassageTable
from kalm_encoder.table.rows import verified_rows
from kalm_encoder.table.spec import TableSpec
from pipeline.messages import Place
from pipeline.table.partitions import (
    hashes_of,
    new_name,
    read_partition,
    repeated_in,
    write_partitions,
)
from pipeline.table.steps import DoPart, StepWork
from pipeline.upkeep.row_ranges import BATCH_ROWS, Piece, TableRows
from pipeline.upkeep.verification.report import SHOWN, Report, engine_errors_are_problems

ROW = "row"
"""Column of the numbers of rows, counted as a scan of the table counts them."""


@dataclass(frozen=True, kw_only=True)
class CheckRows(StepWork):
    """Ranges of rows to check; see `TableRows`.

    Attributes:
        version: Version of the table.
        checks: Whether the values of the rows are checked, and not only their ids hashed.
        hashed: Folder for files of the hashes of the ids. None writes none.
        partitions: Number of partitions of these.
    """

    version: int
    checks: bool = True
    hashed: Location | None = None
    partitions: int = 1

    def load(self, place: Place) -> DoPart:
        """Open the table. A part is the first row of a range and how many it has.

        Its result has the numbers of rows that could be read and of problems, the first SHOWN of
        these, and the name of the file of hashes.
        """
        options = self.table.options
        table = PassageTable.open(self.table.uri, version=self.version, storage_options=options)
        rows = TableRows(table.dataset)
        columns = None if self.checks else ["id"]

        def check(what: tuple[int, int]) -> dict[str, Any]:
            row, num_rows = what
            found = Report(table.uri, table.version)
            hashed = [_hashed([], row)]
            for piece in rows.pieces(row, num_rows):
                id, first = piece.fragment.fragment_id, row
                row += piece.num_rows
                # Each fragment by itself, so that a damaged file hides no other.
                with engine_errors_are_problems(found, "files", f"fragment {id} cannot be read"):
                    for batch in _batches(piece, columns):
                        found.rows += batch.num_rows
                        if self.hashed:
                            hashed.append(_hashed(batch["id"].to_pylist(), first))
                        first += batch.num_rows
                        for key, problem in _bad_rows(batch, table.spec) if self.checks else ():
                            found.add("rows", problem, key)
            result: dict[str, Any] = {
                "rows": found.rows,
                "num_problems": found.num_problems,
                "problems": [asdict(problem) for problem in found.problems],
            }
            if self.hashed:
                name = result["file"] = new_name()
                write_partitions(pa.concat_tables(hashed), self.partitions, self.hashed / name)
            return result

        return check


@dataclass(frozen=True, kw_only=True)
class FindRepeated(StepWork):
    """Partitions of hashes, of which the repeated ones are found.

    Attributes:
        files: The files of hashes.
    """

    files: tuple[Location, ...]

    def load(self, place: Place) -> DoPart:
        """Load nothing. A part is the number of a partition.

        Its result has the number of rows whose id an earlier row has, and the first SHOWN of them.
        """

        def find(number: int) -> dict[str, Any]:
            again = repeated_in(read_partition(self.files, number), ROW, "first")[:, 2]
            again.sort()
            return {"count": len(again), "rows": again[:SHOWN].tolist()}

        return find


def _batches(piece: Piece, columns: list[str] | None) -> Iterator[pa.Table]:
    """Yield the rows of a piece, at most BATCH_ROWS at a time."""
    for batch in piece.fragment.to_batches(
        columns=columns, offset=piece.start, limit=piece.num_rows, batch_size=BATCH_ROWS
    ):
        yield pa.Table.from_batches([batch])


def _hashed(ids: list[str], first: int) -> pa.Table:
    """Return the hashes of the ids of consecutive rows, with the numbers of these."""
    numbers = np.arange(first, first + len(ids), dtype=np.uint64)
    return pa.table({**hashes_of(ids), ROW: numbers})


def _bad_rows(rows: pa.Table, spec: TableSpec) -> Iterator[tuple[str, str]]:
    """Yield the id and the problem of every row whose values are not those that were written."""
    columns = [rows[name].to_pylist() for name in ("id", "text_hash", "shard_id", "checksum")]
    for id, hash, shard, checksum in zip(*columns, strict=True):
        if checksum != row_checksum(id, hash, shard):
            yield id, "id, text_hash or shard_id does not match its checksum"
    if spec.metadata_columns:
        for id in damaged_metadata(rows.select(["id", *spec.metadata_names])):
            yield id, "metadata do not match their checksum"
    if spec.keep_text:
        for id, hash, text in zip(*columns[:2], rows["text"].to_pylist(), strict=True):
            if hash != text_hash(text):
                yield id, "text does not match its hash"
    for ratio in spec.ratios:
        read = list(verified_rows(spec, rows, ratio))
        states = [passage.states for _, passage in read if passage is not None]
        # All at once: row by row, numpy's calls take longer than their work.
        is_finite = not states or bool(np.isfinite(np.concatenate(states)).all())
        for id, passage in read:
            if passage is None:
                yield id, f"states_r{ratio}, num_tokens or truncated does not match its checksum"
            elif not is_finite and not np.isfinite(passage.states).all():
                yield id, f"states_r{ratio} is not finite"
