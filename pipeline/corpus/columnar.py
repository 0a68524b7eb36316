"""Parquet files and Lance tables, cut into ranges of rows.

Planning reads metadata only: a Parquet footer holds sizes, offsets and statistics of every column
chunk, so its hash stands for the content; a Lance version never changes. Ranges do not cross
Parquet row groups, so that reading one range decodes one group.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, pairwise

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from kalm_encoder.errors import InputError
from pipeline.corpus.access import open_binary, readable
from pipeline.corpus.inputs import InputFile, RowRange, range_hash
from pipeline.corpus.passages import FieldOptions, Fields, RawRow


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
            kind = self.schema.field(name).type
            text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            if not text and not (name == fields.id and pa.types.is_integer(kind)):
                raise InputError(f"column {name!r} of {self.path} is {kind}; it must hold strings")
        return fields


class ParquetFile(ColumnarFile):
    """An open Parquet file; it keeps the row group that was read last."""

    def __init__(self, file: InputFile, storage_options: dict[str, str] | None) -> None:
        self.path = file.path
        with readable(file.path):
            raw = open_binary(file.path, storage_options)
            self._parquet = pq.ParquetFile(raw)
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
        if range_hash(self.content, rows.start, rows.length) != rows.content:
            raise InputError(
                f"{self.path} changed after it was planned: encode it into a new table"
            )
        i = bisect_right(self.bounds, rows.start) - 1
        if self._group is None or self._group[0] != i:
            # The next shard is often in the same group, and decoding one takes long.
            with readable(self.path):
                self._group = (i, self._parquet.read_row_group(i, columns=fields.names))
        table = self._group[1].slice(rows.start - self.bounds[i], rows.length)
        yield from enumerate(table.to_pylist(), start=rows.first_line)


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
        """Yield (row number from 1, row) of a range of the version that was planned."""
        planned = self._dataset.checkout_version(rows.version)
        table = planned.to_table(columns=fields.names, offset=rows.start, limit=rows.length)
        yield from enumerate(table.to_pylist(), start=rows.first_line)
