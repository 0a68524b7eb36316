"""The plan: which rows of which file make which shard. Same files in, same shards out.

A shard is a run of rows of one file, whatever the number of workers; its content hash comes from
the bytes it was planned from, and reading it later checks them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import xxhash

from kalm_encoder.errors import InputError
from pipeline.corpus import columnar as columnar_files
from pipeline.corpus import text as text_files
from pipeline.corpus import text_scan
from pipeline.corpus.inputs import FieldOptions, Fields, Passage, Reject, file_format, to_passage
from pipeline.corpus.text import Slice

MAX_SHARDS = (1 << 20) - 1
"""Lance fragment ids are number + 1 in 20 bits; the bits above count generations."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One unit of work.

    Attributes:
        number: position in the plan, from 0.
        path: file it comes from.
        fields: where the passages are in it.
        rows: which rows.
    """

    number: int
    path: str
    fields: Fields
    rows: Slice

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
        """Rows planned, rejects included."""
        return sum(shard.rows.num_rows for shard in self.shards)

    @cached_property
    def hash(self) -> str:
        """Of every shard's content, place and fields, but no path: a moved corpus stays itself."""
        lines = (f"{s.id} {s.rows.content} {s.rows.num_rows} {s.fields.names}" for s in self.shards)
        return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())


def plan_shards(
    files: Sequence[str],
    *,
    shard_size: int,
    limit: int | None = None,
    fields: FieldOptions | None = None,
    storage_options: dict[str, str] | None = None,
) -> Plan:
    """Cut files into shards of `shard_size` rows, the last of a file (or row group) shorter.

    Args:
        files: from `expand_inputs`.
        shard_size: rows a shard.
        limit: use only the first so many rows.
        fields: fields the user named.
        storage_options: for object stores.

    Raises:
        InputError: no passage in any file, a file that cannot be read, or too many shards.
    """
    if shard_size < 1:
        raise InputError(f"shard size {shard_size} must be at least 1")
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit} must be at least 1")
    options = fields or FieldOptions()
    scans = _scans(files, shard_size, limit, options, storage_options)
    shards: list[Shard] = []
    for path, (chosen, slices) in zip(files, scans, strict=False):  # a limit ends them early
        shards += [Shard(len(shards) + i, path, chosen, rows) for i, rows in enumerate(slices)]
    if not shards:
        raise InputError(f"no rows in {', '.join(files)}")
    if len(shards) > MAX_SHARDS:
        raise InputError(
            f"{len(shards)} shards are more than the {MAX_SHARDS} one table can hold: "
            f"raise --shard-size above {shard_size}"
        )
    return Plan(tuple(shards))


def _scans(
    files: Sequence[str],
    shard_size: int,
    limit: int | None,
    options: FieldOptions,
    storage_options: dict[str, str] | None,
) -> Iterator[tuple[Fields, list[Slice]]]:
    """Yield what each file was cut into, in their order.

    Without a limit several files are scanned at once: scanning waits for the store and works
    without the interpreter lock.
    """

    def scan(path: str, left: int | None) -> tuple[Fields, list[Slice]]:
        scan_file = columnar_files.scan if is_columnar(path) else text_scan.scan
        return scan_file(path, shard_size, left, options, storage_options)

    if limit is None:
        with ThreadPoolExecutor(thread_name_prefix="plan") as pool:
            yield from pool.map(lambda path: scan(path, None), files)
        return
    for path in files:
        if limit == 0:
            return
        found = scan(path, limit)
        limit -= sum(rows.num_rows for rows in found[1])
        yield found


class ShardReader:
    """Reads shards; keeps the last file open, since the next shard is often its next part."""

    def __init__(self, storage_options: dict[str, str] | None = None) -> None:
        self._storage_options = storage_options
        self._path: str | None = None
        self._file: text_files.TextFile | columnar_files.ColumnarFile | None = None

    def read(self, shard: Shard) -> tuple[list[Passage], list[Reject]]:
        """Return the usable passages of a shard and its rejects, in input order; ids may repeat.

        Raises:
            InputError: the file changed since it was planned, or is gone.
        """
        if self._file is None or self._path != shard.path:
            module = columnar_files if is_columnar(shard.path) else text_files
            self._file = module.open_file(shard.path, self._storage_options)
            self._path = shard.path
        return to_rows(self._file.read(shard.rows, shard.fields), shard.fields, shard.path)


def to_rows(
    records: Iterable[tuple[int, dict[str, Any] | str]], fields: Fields, path: str
) -> tuple[list[Passage], list[Reject]]:
    """Sort (line, record) pairs of a file into passages and rejects, each in input order."""
    passages: list[Passage] = []
    rejects: list[Reject] = []
    for line, record in records:
        row = (
            Reject(path, line, record)
            if isinstance(record, str)
            else to_passage(record, fields, path, line)
        )
        if isinstance(row, Reject):
            rejects.append(row)
        else:
            passages.append(row)
    return passages, rejects


def is_columnar(path: str) -> bool:
    """Whether slices of a file are measured in rows; those of text files are in bytes."""
    return file_format(path) in ("parquet", "lance")
