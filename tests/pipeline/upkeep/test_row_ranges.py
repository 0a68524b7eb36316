"""Ranges of rows that workers read: every row once, in order, whatever was deleted."""

import lance
import pyarrow as pa
import pytest

from pipeline.upkeep.row_ranges import TableRows


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Fragments of 40, 3 x 5, 10 and 7 rows; rows of all are deleted, of the fifth all."""
    uri = str(tmp_path_factory.mktemp("ranges") / "t.lance")
    begin = 0
    for count in (40, 5, 5, 5, 10, 7):
        rows = pa.table({"n": range(begin, begin + count), "text": ["x" * 50] * count})
        lance.write_dataset(rows, uri, mode="append", enable_stable_row_ids=True)
        begin += count
    dataset = lance.dataset(uri)
    dataset.delete("n % 7 = 3 OR (n >= 55 AND n < 65)")
    return lance.dataset(uri)


@pytest.mark.parametrize("most_rows", [1, 4, 11, 1000])
@pytest.mark.parametrize("most_bytes", [1, 2000, 1 << 30])
def test_ranges_hold_every_row_once_and_in_order(dataset, most_rows, most_bytes):
    rows, whole = TableRows(dataset), dataset.to_table()["n"].to_pylist()
    ranges = rows.cut(most_bytes, most_rows)
    assert [start for start, _ in ranges] == [
        sum(n for _, n in ranges[:i]) for i in range(len(ranges))
    ]
    assert all(0 < count <= most_rows for _, count in ranges)
    read = [
        n
        for start, count in ranges
        for batch in rows.batches(start, count, ["n"])
        for n in batch["n"].to_pylist()
    ]
    assert read == whole


def test_small_fragments_share_a_range_and_large_ones_are_cut_evenly(dataset):
    sizes = [count for _, count in TableRows(dataset).cut(1 << 30, 20)]
    assert sizes == [17, 17, 19]
    (whole,) = TableRows(dataset).cut(1 << 30, 1000)
    assert whole == (0, dataset.count_rows())
