"""Parquet files and Lance tables, cut into ranges of rows.

Planning reads metadata only: a Parquet footer holds sizes, offsets and statistics of every column
chunk, so its hash stands for the content; a Lance version never changes. Ranges do not cross
Parquet row groups, so that reading one range decodes one group.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from kalm_encoder.errors import InputError
from kalm_encoder.table.metadata import kept_type
from pipeline.corpus.access import open_binary, readable
from pipeline.corpus.foreign import refuse_signature
from pipeline.corpus.inputs import InputFile, RowRange, range_hash
from pipeline.corpus.metadata import column_type
from pipeline.corpus.passages import FieldOptions, Fields, RawRow

NOT_UTF8 = re.compile(r"utf-?8 ((byte )?sequence|character|codepoint)", re.IGNORECASE)
"""How the errors read with which Lance refuses a string; they have no class of their own."""


class ColumnarFile:
    """The common part of Parquet files and Lance tables.

    Attributes:
        path: Path or URL.
        schema: Arrow schema.
        content: What stands for the content of the whole file in the hashes of its ranges.
        bounds: First rows of the parts that are decoded as a whole, and the number of all rows.
        version: Version of a Lance table; 0 for a Parquet file.
    """

    path: str
    schema: pa.Schema
    content: str
    bounds: list[int]
    version: int = 0

    def scan(
        self, shard_size: int, max_rows: int | None, options: FieldOptions
    ) -> tuple[Fields, list[RowRange]]:
        """Choose the fields and cut the file into ranges, from its metadata alone.

        Raises:
            InputError: If an id or text column is missing or has the wrong type.
        """
        fields = self.choose_fields(options)
        ranges = []
        for first, end in pairwise(self.bounds):
            if max_rows is not None:
                end = min(end, max_rows)
            for start in range(first, end, shard_size):
                ranges.append(self.row_range(start, min(shard_size, end - start)))
        return fields, ranges

    def row_range(self, start: int, num_rows: int) -> RowRange:
        """Return the range of `num_rows` rows from row `start`."""
        content = range_hash(self.content, start, num_rows)
        return RowRange(start, num_rows, start + 1, num_rows, content, version=self.version)

    def choose_fields(self, options: FieldOptions) -> Fields:
        """Choose the columns that make a passage.

        Raises:
            InputError: If an id or text column is missing or has the wrong type.
        """
        fields = options.detect(self.schema.names, self.path)
        for name in fields.names:
            kind, is_id = _value_type(self.schema.field(name).type), name == fields.id
            is_number = is_id and pa.types.is_integer(kind)
            is_no_title = name == fields.title and pa.types.is_null(kind)
            if not (kept_type(kind) == "string" or is_number or is_no_title):
                raise InputError(
                    f"column {name!r} of {self.path} is {kind}; it must hold strings"
                    f"{' or integers' if is_id else ''}: {_remedy(kind, is_id)}"
                )
        columns = ((self.schema.field(name), given) for name, given in options.keep)
        keep = tuple((field.name, column_type(field, given, self.path)) for field, given in columns)
        return replace(fields, keep=keep)


class ParquetFile(ColumnarFile):
    """An open Parquet file; it keeps the row group that was read last."""

    def __init__(self, file: InputFile, storage_options: dict[str, str] | None) -> None:
        self.path = file.path
        with readable(file.path):
            raw = open_binary(file.path, storage_options)
            try:
                self._parquet = pq.ParquetFile(raw)
            except pa.ArrowInvalid:
                raw.seek(0)
                if not (begins := raw.read(64)).startswith(b"PAR1"):
                    refuse_signature(file.path, begins)
                raise
            # The last 8 bytes of a Parquet file are the length of its footer and the magic PAR1.
            raw.seek(-8, 2)
            size = int.from_bytes(raw.read(4), "little")
            raw.seek(-8 - size, 2)
            self.content = xxhash.xxh3_128_hexdigest(raw.read(size))
        self.schema = self._parquet.schema_arrow
        groups = map(self._parquet.metadata.row_group, range(self._parquet.num_row_groups))
        self.bounds = list(accumulate((group.num_rows for group in groups), initial=0))
        self._group: tuple[int, pa.Table] | None = None

    def read(self, rows: RowRange, fields: Fields) -> Iterator[tuple[int, RawRow]]:
        """Yield (row number from 1, row) of a range.

        Raises:
            InputError: If the file changed since it was planned, or cannot be read.
        """
        table = self._table(rows, fields).select(fields.names)
        yield from enumerate(_rows(table), start=rows.first_line)

    def columns(self, rows: RowRange, fields: Fields) -> dict[str, pa.ChunkedArray]:
        """Return the columns to keep of a range that was read.

        Raises:
            InputError: If the file changed since it was planned, or cannot be read.
        """
        table = self._table(rows, fields)
        return {name: table[name] for name in fields.kept_names}

    def _table(self, rows: RowRange, fields: Fields) -> pa.Table:
        if range_hash(self.content, rows.start, rows.length) != rows.content:
            raise InputError(
                f"{self.path} changed after it was planned: encode it into a new table"
            )
        i = bisect_right(self.bounds, rows.start) - 1
        if self._group is None or self._group[0] != i:
            # The next shard is often in the same group, and decoding one takes long.
            names = list(dict.fromkeys(fields.names + fields.kept_names))
            with readable(self.path):
                self._group = (i, self._parquet.read_row_group(i, columns=names))
        return self._group[1].slice(rows.start - self.bounds[i], rows.length)


class LanceTable(ColumnarFile):
    """A Lance table; the version that is current when it is opened is the one that is planned."""

    def __init__(self, file: InputFile, storage_options: dict[str, str] | None) -> None:
        self.path = file.path
        with readable(file.path):
            self._dataset = lance.dataset(file.path, storage_options=storage_options)
        self.schema = self._dataset.schema
        self.version = self._dataset.version
        self.content = f"lance version {self.version}"
        self.bounds = [0, self._dataset.count_rows()]  # any range of rows is cheap to read

    def read(self, rows: RowRange, fields: Fields) -> Iterator[tuple[int, RawRow]]:
        """Yield (row number from 1, row) of a range of the version that was planned.

        Raises:
            InputError: If the version is gone, or cannot be read.
        """
        line = rows.first_line
        for part in self._parts(rows, fields.names + fields.kept_names):
            bad: list[RawRow] = ["a string of the row is not UTF-8"]
            some = bad if part is None else _rows(part.select(fields.names))
            yield from enumerate(some, start=line)
            line += len(some)

    def columns(self, rows: RowRange, fields: Fields) -> dict[str, pa.ChunkedArray]:
        """Return the columns to keep of a range; a row that cannot be read has nulls.

        Raises:
            InputError: If the version is gone, or cannot be read.
        """
        names = fields.kept_names
        nulls = pa.table({name: pa.nulls(1, self.schema.field(name).type) for name in names})
        parts = self._parts(rows, names)
        table = pa.concat_tables([nulls if part is None else part.select(names) for part in parts])
        return {name: table[name] for name in names}

    def _parts(self, rows: RowRange, names: list[str]) -> list[pa.Table | None]:
        with readable(self.path):
            planned = self._dataset.checkout_version(rows.version)
            columns = list(dict.fromkeys(names))
            return list(_lance_parts(planned, columns, rows.start, rows.length))


def _lance_parts(
    dataset: lance.LanceDataset, columns: list[str], start: int, length: int
) -> Iterator[pa.Table | None]:
    """Yield the rows of a range; None stands for one with a string that is not UTF-8.

    Lance refuses to read a range with such a string. Then each half is read alone.
    """
    try:
        yield dataset.to_table(columns=columns, offset=start, limit=length)
    except (OSError, ValueError) as error:
        if not NOT_UTF8.search(str(error)):
            raise
        if length == 1:
            yield None
            return
        half = length // 2
        yield from _lance_parts(dataset, columns, start, half)
        yield from _lance_parts(dataset, columns, start + half, length - half)


def _rows(table: pa.Table) -> list[RawRow]:
    """Return the rows of a table.

    A string that is not UTF-8 becomes one that is not valid Unicode either, as in text files, so
    that only its row is rejected.
    """
    try:
        return list(table.to_pylist())
    except UnicodeDecodeError:
        columns = [_decoded(column) for column in table.itercolumns()]
        return [
            dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)
        ]


def _decoded(column: pa.ChunkedArray) -> list[Any]:
    if kept_type(column.type) != "string":
        return list(column.to_pylist())
    values = column.cast(pa.large_binary()).to_pylist()
    return [
        value if value is None else value.decode("utf-8", "surrogateescape") for value in values
    ]


def _value_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values of a column, which may be stored as numbers of a dictionary."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _remedy(kind: pa.DataType, is_id: bool) -> str:
    """Return how a column of a type that cannot be used becomes one that can."""
    types = pa.types
    if types.is_null(kind):
        return "all its values are null, so leave the file out, or name another column"
    if is_id and (types.is_floating(kind) or types.is_decimal(kind)):
        return "cast whole numbers, such as column.cast('int64') in pyarrow"
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return "if its bytes are UTF-8, cast it, such as column.cast('string') in pyarrow"
    return "convert it first"
