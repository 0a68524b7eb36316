"""What other programs write is read exactly, or named: never a row that is changed, or missing.

Each writer gets rows with hostile cells. It is read back through plan, shards and passages. Every
row must arrive as it was written, or be a reject with a line of its own, or the file must be
refused. Writers whose files say everything must arrive whole.
"""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kalm_encoder.errors import InputError
from pipeline.corpus.inputs import expand_inputs
from pipeline.corpus.passages import FieldOptions
from pipeline.corpus.shards import ShardReader, plan_shards

NAMES = ("id", "title", "text")
Row = tuple[str, str, str]


@dataclass(frozen=True)
class Writer:
    """How some program writes rows.

    Attributes:
        name: Name of the file, whose ending is that of its format.
        write: Takes the order of the columns and the rows. Returns what comes before the rows, and
            the bytes of each row; of a library that writes all at once, one part.
        options: How the file is to be read.
        exact: Whether every row must arrive.
        without: Characters that the writer cannot write.
    """

    name: str
    write: Callable[[tuple[str, ...], list[Row]], list[bytes]]
    options: dict = field(default_factory=dict)
    exact: bool = True
    without: str = ""


def ordered(order, row):
    return [row[NAMES.index(name)] for name in order]


def by_csv(header=True, encoding="utf-8", **dialect):
    def write(order, rows):
        def line(cells):
            out = io.StringIO(newline="")
            csv.writer(out, **dialect).writerow(cells)
            return out.getvalue()

        lines = [line(order) if header else "", *(line(ordered(order, row)) for row in rows)]
        return [lines[0].encode(encoding), *(line.encode() for line in lines[1:])]

    return write


def frame(order, rows):
    return {name: [row[NAMES.index(name)] for row in rows] for name in order}


def by_pandas(encoding="utf-8", **options):
    def write(order, rows):
        out = io.BytesIO()
        table = pd.DataFrame(frame(order, rows), dtype=object)
        table.to_csv(out, index=False, encoding=encoding, **options)
        return [out.getvalue()]

    return write


def pandas_json(order, rows):
    table = pd.DataFrame(frame(order, rows), dtype=object)
    return [table.to_json(orient="records", lines=True).encode()]


def by_polars(**options):
    def write(order, rows):
        out = io.BytesIO()
        pl.DataFrame(frame(order, rows)).write_csv(out, **options)
        return [out.getvalue()]

    return write


def polars_json(order, rows):
    out = io.BytesIO()
    pl.DataFrame(frame(order, rows)).write_ndjson(out)
    return [out.getvalue()]


def by_pyarrow(**options):
    def write(order, rows):
        out = io.BytesIO()
        pa_csv.write_csv(pa.table(frame(order, rows)), out, pa_csv.WriteOptions(**options))
        return [out.getvalue()]

    return write


def parquet(library):
    def write(order, rows):
        out = io.BytesIO()
        if library is pl:
            pl.DataFrame(frame(order, rows)).write_parquet(out)
        else:
            pq.write_table(pa.table(frame(order, rows)), out)
        return [out.getvalue()]

    return write


def by_json(**options):
    def write(order, rows):
        return [b"", *(json.dumps(dict(zip(NAMES, r, strict=True)), **options).encode() + b"\n"
                       for r in rows)]  # fmt: skip

    return write


def spark_csv(order, rows):
    """Spark's default: quotes are escaped with a backslash, which itself is not."""

    def cell(text):
        if text and not any(c in text for c in '",\r\n'):
            return text
        return '"' + text.replace('"', '\\"') + '"'

    lines = [order, *(ordered(order, row) for row in rows)]
    return [",".join(map(cell, cells)).encode() + b"\n" for cells in lines]


def spark_json(order, rows):
    """Spark leaves out what is null; here an empty title is."""
    kept = [{k: v for k, v in zip(NAMES, r, strict=True) if v or k != "title"} for r in rows]
    return [b"", *(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in kept)]


def by_hand(delimiter, header=True):
    """What a script makes with a format string: no quoting, no escaping."""

    def write(order, rows):
        lines = [delimiter.join(cells).encode() + b"\n" for cells in
                 (order, *(ordered(order, row) for row in rows))]  # fmt: skip
        return lines if header else [b"", *lines[1:]]

    return write


def one_quote_too_many(write):
    """A typing error: the first cell of the middle row, if it has no quotes, gets one."""

    def spoiled(order, rows):
        before, *lines = write(order, rows)
        middle = len(lines) // 2
        if not lines[middle].startswith(b'"'):
            lines[middle] = b'"' + lines[middle]
        return [before, *lines]

    return spoiled


QUOTED, UNQUOTED = {"quoting": True}, {"quoting": False}
WRITERS = {
    "csv": Writer("c.csv", by_csv(), QUOTED),
    "csv, line feeds": Writer("c.csv", by_csv(lineterminator="\n"), QUOTED, exact=False),
    "csv, quote all": Writer("c.csv", by_csv(quoting=csv.QUOTE_ALL), QUOTED),
    "csv, quote all, read by default": Writer("c.csv", by_csv(quoting=csv.QUOTE_ALL), exact=False),
    "csv, unix": Writer("c.csv", by_csv(dialect="unix"), QUOTED),
    "csv, byte order mark": Writer("c.csv", by_csv(encoding="utf-8-sig"), QUOTED),
    "csv, no header": Writer(
        "c.csv", by_csv(header=False), QUOTED | {"columns": True}, without="\ufeff"
    ),
    "csv, escapes": Writer(
        "c.csv", by_csv(doublequote=False, escapechar="\\"), exact=False, without="\\"
    ),
    "csv, tabs": Writer("c.tsv", by_csv(dialect="excel-tab"), QUOTED),
    "csv, tabs, read by default": Writer("c.tsv", by_csv(dialect="excel-tab"), exact=False),
    "pandas": Writer("c.csv", by_pandas(lineterminator="\r\n"), QUOTED),
    "pandas, line feeds": Writer("c.csv", by_pandas(), QUOTED, exact=False),
    "pandas, quote all": Writer("c.csv", by_pandas(quoting=csv.QUOTE_ALL), QUOTED),
    "pandas, for Excel": Writer(
        "c.csv", by_pandas("utf-8-sig", quoting=csv.QUOTE_NONNUMERIC), QUOTED
    ),
    "pandas, tabs": Writer("c.tsv", by_pandas(sep="\t", lineterminator="\r\n"), QUOTED),
    "pandas, JSON": Writer("c.jsonl", pandas_json),
    "polars": Writer("c.csv", by_polars(), QUOTED),
    "polars, quote all": Writer("c.csv", by_polars(quote_style="always"), QUOTED),
    "polars, never quote": Writer(
        "c.tsv", by_polars(quote_style="never", separator="\t"), UNQUOTED, False, without="\n"
    ),
    "polars, tabs": Writer("c.tsv", by_polars(separator="\t", include_bom=True), QUOTED),
    "polars, JSON": Writer("c.jsonl", polars_json),
    "polars, Parquet": Writer("c.parquet", parquet(pl)),
    "pyarrow": Writer("c.csv", by_pyarrow(), QUOTED),
    "pyarrow, all valid": Writer("c.csv", by_pyarrow(quoting_style="all_valid"), QUOTED),
    "pyarrow, Parquet": Writer("c.parquet", parquet(pa)),
    "json": Writer("c.jsonl", by_json()),
    "json, UTF-8": Writer("c.jsonl", by_json(ensure_ascii=False)),
    "Spark, CSV": Writer("c.csv", spark_csv, exact=False),
    "Spark, JSON": Writer("c.jsonl", spark_json),
    "by hand, commas": Writer("c.csv", by_hand(","), UNQUOTED, exact=False, without="\n"),
    "by hand, tabs": Writer("c.tsv", by_hand("\t"), UNQUOTED, exact=False, without="\n"),
    "by hand, no header": Writer(
        # The start of the first line may be a byte order mark, and its end tells how lines end.
        "c.tsv",
        by_hand("\t", False),
        {"columns": True},
        exact=False,
        without="\r\n\ufeff",
    ),
    "a quote too many": Writer("c.csv", one_quote_too_many(by_csv()), QUOTED, exact=False),
    "a quote too many, tabs": Writer(
        "c.tsv", one_quote_too_many(by_csv(dialect="excel-tab")), exact=False
    ),
}

PIECES = [
    *'"\',;\t\r\n\\ #{[-0ax', '""', "\r\n", "\n\n", '\\"', "\u2028", "\x85", "\x1c", "\0", "\v",
    "\ufeff", "é", "漢", "😀", "NULL", "null", "\\N", "007", "1e5", "id", "text", "x" * 3000,
]  # fmt: skip
CELLS = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)
ROWS = st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=8).map(
    lambda rows: [(f"{i}{id}", title, text) for i, (id, title, text) in enumerate(rows)]
)


def passage(row: Row) -> tuple[str, str]:
    return row[0], f"{row[1]} {row[2]}".strip()


def read_back(path, options):
    plan = plan_shards(
        expand_inputs([str(path)], None), shard_size=3, fields=FieldOptions(**options)
    )
    reader = ShardReader()
    read = [reader.read(shard) for shard in plan.shards]
    passages = [p for some, _, _ in read for p in some]
    rejects = [r for _, some, _ in read for r in some]
    assert len(passages) + len(rejects) == plan.num_rows
    return passages, rejects


def check(writer, path, order, rows):
    """Write rows, read them back, and return how many are exact; all others are named."""
    rows = [tuple(c.translate(dict.fromkeys(map(ord, writer.without))) for c in r) for r in rows]
    before, *parts = writer.write(order, rows)
    path.write_bytes(before + b"".join(parts))
    options = writer.options | ({"columns": order} if "columns" in writer.options else {})
    try:
        passages, rejects = read_back(path, options)
    except InputError as error:
        assert path.name in str(error)
        # A short file with many NULs cannot be told from UTF-16: it is refused by name.
        assert not writer.exact or b"\0" in path.read_bytes()
        return 0
    expected = [passage(row) for row in rows]
    read = [(p.id, p.text) for p in passages]
    assert not set(read) - set(expected), "a row that was not written so"
    if writer.exact:
        assert read == expected
    assert read == [e for e in expected if e in read], "another order, or a row twice"
    if parts:
        first_line, rejected = 1 + before.count(b"\n"), {r.line for r in rejects}
        for row, part in zip(expected, parts, strict=True):
            own = range(first_line, first_line + part.count(b"\n"))
            assert row in read or rejected & set(own), "a row that is missing and not named"
            first_line = own.stop
    else:
        assert len(read) + len(rejects) >= len(rows)
    return len(read)


@pytest.mark.parametrize("name", WRITERS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(order=st.permutations(NAMES).map(tuple), rows=ROWS)
def test_what_a_writer_wrote_is_read_exactly_or_named(tmp_path, name, order, rows):
    check(WRITERS[name], tmp_path / WRITERS[name].name, order, rows)
