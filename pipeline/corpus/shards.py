"""The plan: which rows of which file make which shard. The same files give the same shards.

A shard is a run of rows of one file, whatever the number of workers. Its content hash comes from
the bytes it was planned from, and reading it later checks them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import pyarrow as pa
import xxhash

from kalm_encoder.errors import InputError
from kalm_encoder.table.metadata import Columns
from pipeline.corpus.cells import Cells
from pipeline.corpus.erased import ERASED_REASON, NONE_ERASED, ErasedIds
from pipeline.corpus.hub import commits
from pipeline.corpus.inputs import InputFile, RowRange
from pipeline.corpus.metadata import text_fields, with_metadata
from pipeline.corpus.passages import FieldOptions, Fields, Passage, RawRow, Reject, to_passage
from pipeline.corpus.reading import readings
from pipeline.corpus.scans import CorpusFile, ScanFiles, open_file, scan_first_rows, scan_in_threads
from pipeline.corpus.text_scan import TextFile

MAX_SHARDS = (1 << 20) - 1
"""Lance fragment ids are number + 1 in 20 bits; the bits above count generations."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One unit of work and of commit.

    Attributes:
        number: Position in the plan, from 0.
        file: File that it comes from.
        fields: Where the passages are in the file.
        rows: Which rows of the file.
    """

    number: int
    file: InputFile
    fields: Fields
    rows: RowRange

    @property
    def path(self) -> str:
        """Path or URL of its file."""
        return self.file.path

    @property
    def size(self) -> int:
        """Bytes of a text file, or rows of a columnar one."""
        return self.rows.length

    @property
    def measure(self) -> str:
        """What `size` counts."""
        return "rows" if self.file.is_columnar else "bytes"

    @property
    def is_packed(self) -> bool:
        """Whether its file is only read from the start."""
        return self.file.is_packed

    @property
    def id(self) -> str:
        """Position and content, such as `000012-9f3c…`."""
        return f"{self.number:06d}-{self.rows.content[:12]}"


@dataclass(frozen=True)
class Plan:
    """All shards of a job."""

    shards: tuple[Shard, ...]

    @cached_property
    def num_rows(self) -> int:
        """Number of planned rows, rejects included."""
        return sum(shard.rows.num_rows for shard in self.shards)

    @property
    def metadata_columns(self) -> Columns:
        """The metadata columns that its shards have, and their types."""
        return self.shards[0].fields.keep

    @cached_property
    def hash(self) -> str:
        """Hash of each shard's content, place and reading, but of no path: a corpus may move."""
        lines = (
            f"{s.id} {s.rows.content} {s.rows.num_rows} {s.fields.names}{_reading(s.rows.cells)}"
            for s in self.shards
        )
        return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())

    @property
    def hub_commits(self) -> str:
        """The datasets of the Hugging Face hub that it reads, each at its commit, with commas."""
        return commits(shard.path for shard in self.shards)

    @property
    def readings(self) -> list[str]:
        """How the files are read, and which options choose another reading."""
        return readings((shard.path, shard.fields, shard.rows.cells) for shard in self.shards)


def _reading(cells: Cells | None) -> str:
    return f" {cells.columns} {cells.delimiter} {cells.quoting}" if cells else ""


def plan_shards(
    files: Sequence[InputFile],
    *,
    shard_size: int,
    limit: int | None = None,
    fields: FieldOptions | None = None,
    storage_options: dict[str, str] | None = None,
    scan_files: ScanFiles | None = None,
) -> Plan:
    """Cut files into shards of `shard_size` rows; the last of a file (or row group) is shorter.

    Args:
        files: Files, from `expand_inputs`.
        shard_size: Rows per shard.
        limit: Number of rows to use, from the first one on; None uses all.
        fields: Fields that the user named.
        storage_options: Options of the object store.
        scan_files: Scans the files if there is no limit; None does it in this process.

    Raises:
        InputError: If there is no row, a file cannot be read, the types of a metadata column differ
            between files, or there are too many shards.
    """
    if shard_size < 1:
        raise InputError(f"shard size {shard_size} must be at least 1")
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit} must be at least 1")
    options = fields or FieldOptions()
    if limit is None:
        scans = (scan_files or scan_in_threads)(files, shard_size, options, storage_options)
    else:
        scans = scan_first_rows(files, limit, shard_size, options, storage_options)
    _check_same_types(list(zip(files, (chosen for chosen, _ in scans), strict=False)))
    shards: list[Shard] = []
    for file, (chosen, ranges) in zip(files, scans, strict=False):  # a limit ends the scans early
        shards += [Shard(len(shards) + i, file, chosen, rows) for i, rows in enumerate(ranges)]
    if not shards:
        raise InputError(f"no rows in {', '.join(file.path for file in files)}")
    if len(shards) > MAX_SHARDS:
        raise InputError(
            f"{len(shards)} shards are more than the {MAX_SHARDS} one table can hold: raise "
            f"--shard-size above {shard_size}"
        )
    return Plan(tuple(shards))


def _check_same_types(files: Sequence[tuple[InputFile, Fields]]) -> None:
    """Refuse files that would give one metadata column several types."""
    first, expected = files[0]
    for file, fields in files:
        for (name, type), (_, other) in zip(expected.keep, fields.keep, strict=True):
            if type != other:
                raise InputError(
                    f"column {name!r} would be kept as {type} from {first.path} and as {other} "
                    f"from {file.path}: give one type for all, such as --keep {name}:{type}"
                )


class ShardRows(NamedTuple):
    """What became of the rows of a shard, in input order; ids may repeat.

    Attributes:
        passages: The rows that can be encoded.
        rejects: The other rows.
        metadata: The metadata columns of the passages; None if no field is kept.
    """

    passages: list[Passage]
    rejects: list[Reject]
    metadata: pa.Table | None = None

    def take(self, places: Sequence[int]) -> ShardRows:
        """Return only the passages at these places, and all rejects."""
        metadata = self.metadata
        if metadata is not None:
            metadata = metadata.take(pa.array(places, pa.int64()))
        return ShardRows([self.passages[place] for place in places], self.rejects, metadata)


Split = Callable[[ShardRows, str], ShardRows]
"""Cuts the documents of a shard of the file at a path into passages; see splitting.py."""


class ShardReader:
    """Reads shards; it keeps the last file open, since the next shard often continues it.

    Args:
        storage_options: Options of the store of the files.
        erased: Ids whose rows are rejected.
        split: Cuts the documents of a shard into passages; None if its rows are passages.
    """

    def __init__(
        self,
        storage_options: dict[str, str] | None = None,
        erased: ErasedIds = NONE_ERASED,
        split: Split | None = None,
    ) -> None:
        self._storage_options = storage_options
        self._erased = erased
        self._split = split
        self._open: CorpusFile | None = None
        self._file: InputFile | None = None

    def raw(self, shard: Shard) -> Iterable[tuple[int, RawRow]]:
        """Return the rows of a shard as they are in its file, each with its line."""
        return self._opened(shard).read(shard.rows, shard.fields)

    def _opened(self, shard: Shard) -> CorpusFile:
        if self._open is None or self._file != shard.file:
            self._open, self._file = open_file(shard.file, self._storage_options), shard.file
        return self._open

    def read(self, shard: Shard) -> ShardRows:
        """Return the usable passages of a shard, their metadata and its rejects.

        Raises:
            InputError: If the file changed since it was planned, or cannot be read.
        """
        fields, path, metadata = shard.fields, shard.path, None
        rows = self.raw(shard)
        if fields.keep:
            rows = list(rows)
        found = [to_passage(row, fields, path, line) for line, row in rows]
        if fields.keep:
            file = self._opened(shard)
            if isinstance(file, TextFile):
                values = text_fields([row for _, row in rows], fields)
            else:
                values = file.columns(shard.rows, fields)
            are_cells = shard.rows.cells is not None
            found, metadata = with_metadata(found, values, fields, path, are_cells=are_cells)
        passages = [row for row in found if isinstance(row, Passage)]
        rejects = [row for row in found if isinstance(row, Reject)]
        usable = self._without_erased(shard, ShardRows(passages, rejects, metadata))
        return usable if self._split is None else self._split(usable, path)

    def _without_erased(self, shard: Shard, rows: ShardRows) -> ShardRows:
        if not self._erased.hashes:
            return rows
        erased = [passage.id in self._erased for passage in rows.passages]
        found = [p for p, is_erased in zip(rows.passages, erased, strict=True) if is_erased]
        kept = rows.take([place for place, is_erased in enumerate(erased) if not is_erased])
        more = [Reject(shard.path, passage.line, ERASED_REASON) for passage in found]
        return kept._replace(rejects=rows.rejects + more)
