"""Parquet files and Lance tables, cut into row ranges.

Planning reads metadata only: a Parquet footer holds sizes, offsets and statistics of every column
chunk, so its hash stands for the content; a Lance version never changes. Shards do not cross
Parquet row groups, so that reading one decodes one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fsspec
import lance
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from kalm_encoder.errors import InputError
from pipeline.corpus.inputs import FieldOptions, Fields, file_format, fsspec_options
from pipeline.corpus.text import Slice


class ParquetFile:
    """An open Parquet file; the row group read last is kept."""

    def __init__(self, path: str, storage_options: dict[str, str] | None) -> None:
        self.path = path
        try:
            options = fsspec_options(path, storage_options)
            self._raw = fsspec.open(path, "rb", **options).open()
            self.parquet = pq.ParquetFile(self._raw)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"cannot read {path}: {error}") from error
        self.content = self._footer_hash()
        self._group: tuple[int, pa.Table] | None = None

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of the file."""
        return self.parquet.schema_arrow

    def groups(self) -> Iterator[tuple[int, int]]:
        """Yield (first row, rows) of each row group."""
        start = 0
        for i in range(self.parquet.num_row_groups):
            rows = self.parquet.metadata.row_group(i).num_rows
            yield start, rows
            start += rows

    def read(self, rows: Slice, fields: Fields) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """Yield (row number from 1, record) of a slice."""
        if slice_hash(self.content, rows.start, rows.length) != rows.content:
            raise InputError(
                f"{self.path} changed after it was planned: encode it into a new table"
            )
        for i, (start, size) in enumerate(self.groups()):
            if start <= rows.start < start + size:
                try:
                    if self._group is None or self._group[0] != i:
                        table = self.parquet.read_row_group(i, columns=fields.names)
                        self._group = (i, table)
                except (OSError, pa.ArrowException) as error:
                    raise InputError(f"cannot read {self.path}: {error}") from error
                part = self._group[1].slice(rows.start - start, rows.length)
                yield from enumerate(part.to_pylist(), start=rows.first_line)

    def _footer_hash(self) -> str:
        self._raw.seek(-8, 2)
        size = int.from_bytes(self._raw.read(4), "little")
        self._raw.seek(-8 - size, 2)
        return xxhash.xxh3_128_hexdigest(self._raw.read(size))


class LanceTable:
    """A Lance table at the version that was planned."""

    def __init__(self, path: str, storage_options: dict[str, str] | None) -> None:
        self.path = path
        try:
            self.dataset = lance.dataset(path, storage_options=storage_options)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {error}") from error
        self.content = f"lance version {self.dataset.version}"

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of the table."""
        return self.dataset.schema

    def groups(self) -> Iterator[tuple[int, int]]:
        """Yield the whole table: any row range is cheap to read."""
        yield 0, self.dataset.count_rows()

    def read(self, rows: Slice, fields: Fields) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """Yield (row number from 1, record) of a slice of the planned version."""
        at = self.dataset.checkout_version(rows.version)
        part = at.to_table(columns=fields.names, offset=rows.start, limit=rows.length)
        yield from enumerate(part.to_pylist(), start=rows.first_line)


ColumnarFile = ParquetFile | LanceTable


def open_file(path: str, storage_options: dict[str, str] | None) -> ColumnarFile:
    """Open a Parquet file or Lance table.

    Raises:
        InputError: it cannot be read.
    """
    kind = ParquetFile if file_format(path) == "parquet" else LanceTable
    return kind(path, storage_options)


def scan(
    path: str,
    shard_size: int,
    max_rows: int | None,
    options: FieldOptions,
    storage_options: dict[str, str] | None,
) -> tuple[Fields, list[Slice]]:
    """Choose the fields of a file and cut it into slices, from its metadata alone.

    Raises:
        InputError: it cannot be read, or an id or text column is missing or of the wrong type.
    """
    file = open_file(path, storage_options)
    fields = choose_fields(file, options)
    version = file.dataset.version if isinstance(file, LanceTable) else 0
    slices = []
    left = max_rows
    for first, size in file.groups():
        for start in range(first, first + size, shard_size):
            rows = min(shard_size, first + size - start)
            rows = rows if left is None else min(rows, left)
            if rows:
                content = slice_hash(file.content, start, rows)
                slices.append(Slice(start, rows, start + 1, rows, content, (), version))
            left = None if left is None else left - rows
    return fields, slices


def choose_fields(file: ColumnarFile, options: FieldOptions) -> Fields:
    """Choose the columns of a passage.

    Raises:
        InputError: an id or text column is missing or of the wrong type.
    """
    fields = options.detect(file.schema.names, file.path)
    for name in fields.names:
        kind = file.schema.field(name).type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not text and not (name == fields.id and pa.types.is_integer(kind)):
            raise InputError(f"column {name!r} of {file.path} is {kind}; it must hold strings")
    return fields


def slice_hash(content: str, start: int, rows: int) -> str:
    """Return the content hash of a row range, from the file's."""
    return xxhash.xxh3_128_hexdigest(f"{content} {start} {rows}".encode())
