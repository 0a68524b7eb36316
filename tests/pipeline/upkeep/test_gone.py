"""Ids that a source table lost between two versions."""

import random

import lance
import pyarrow as pa
import pytest

from kalm_encoder.table.location import Location
from pipeline.table import partitions
from pipeline.table.steps import Steps
from pipeline.upkeep.comparison import gone
from pipeline.upkeep.comparison.gone import ids_gone
from pipeline.workers.local import in_process


@pytest.mark.parametrize("parts", ["one", "many"])
@pytest.mark.parametrize("kind", [pa.string(), pa.int64(), pa.dictionary(pa.int32(), pa.string())])
def test_an_id_is_gone_if_no_row_has_it_any_more(tmp_path, monkeypatch, kind, parts):
    if parts == "many":
        monkeypatch.setattr(gone, "GROUP_ROWS", 25)
        monkeypatch.setattr(gone, "READ_AT_ONCE", 3)
        monkeypatch.setattr(partitions, "PARTITION_ROWS", 30)
    rng = random.Random(str(kind) + parts)

    def rows(numbers):
        values = pa.array([None if n is None else str(n) for n in numbers], pa.string())
        return pa.table({"key": values.cast(kind), "n": list(range(len(numbers)))})

    path = str(tmp_path / "source.lance")
    before = [rng.randrange(150) for _ in range(200)] + [None]  # some repeated, one without an id
    source = lance.write_dataset(rows(before), path, max_rows_per_file=20)
    first = source.version
    left = rng.sample(range(200), 120)
    source.delete(f"n NOT IN ({', '.join(map(str, left))})")
    again = [*rng.sample(range(150), 30), 999, None]
    source = lance.write_dataset(rows(again), path, mode="append", max_rows_per_file=20)
    now = {before[n] for n in left} | set(again)
    table = Location(str(tmp_path / "t.lance"))
    works = []

    def execute(work, units):
        works.extend([type(work).__name__] * len(units))
        yield from in_process(work, units)

    found = ids_gone(Steps(execute), table, Location(path), "key", first, source.version)
    assert sorted(found) == sorted(str(n) for n in set(before) - now if n is not None)
    assert len(found) > 5
    assert (len(works) > 15) == (parts == "many")
    assert not [path for path in tmp_path.rglob("t.lance/**/*") if path.is_file()]
