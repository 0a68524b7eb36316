"""What some rows show of a corpus is said before the first forward, with a remedy that works."""

import csv
import json
import logging
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kalm_encoder import PassageTable
from kalm_encoder.errors import InputError, TooManyRejectsError
from kalm_encoder.table.location import Location
from pipeline.corpus.passages import FieldOptions
from pipeline.run import first_look
from pipeline.run.driver import run
from pipeline.run.first_look import some_shards
from pipeline.run.job import EncodeJob, plan_job
from pipeline.table.rejects import RejectStore
from pipeline.workers.local import in_process


def never(config, shards):
    raise AssertionError("the device is used")
    yield


@pytest.fixture
def job(model_dir, tmp_path):
    return EncodeJob(
        inputs=(str(tmp_path / "*.jsonl"),), uri=str(tmp_path / "t.lance"), model=str(model_dir),
        shard_size=4,
    )  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def segments(count):
    """Segments of documents, three of each, as in MS MARCO v2."""
    return [{"seg": f"s{i}", "docid": f"d{i // 3}", "text": f"text {i}"} for i in range(count)]


@pytest.mark.parametrize(
    ("remedy", "rows"),
    [
        ({"fields": FieldOptions(id="seg")}, 9),
        ({"on_duplicate": "first"}, 3),
        ({"on_duplicate": "last"}, 3),
    ],
)
def test_repeated_ids_are_refused_before_the_device_is_used(job, tmp_path, remedy, rows):
    write(tmp_path / "c.jsonl", segments(9))
    with pytest.raises(InputError) as refused:
        run(job, never)
    words = str(refused.value)
    assert "6 repeat an id, such as 'd0' in " in words
    assert f"{tmp_path}/c.jsonl line 1 and {tmp_path}/c.jsonl line 2" in words
    assert "field 'docid': if another holds them, name it with --id-field" in words
    assert "--on-duplicate first or last" in words
    assert run(replace(job, **remedy), in_process).num_rows == rows


def test_a_mended_file_goes_to_the_same_table(job, tmp_path):
    write(tmp_path / "c.jsonl", segments(9))
    with pytest.raises(InputError):
        run(job, never)
    write(tmp_path / "c.jsonl", segments(9)[::3])
    assert run(job, in_process).num_rows == 3


def test_a_dropped_row_is_announced(job, tmp_path, caplog):
    write(tmp_path / "c.jsonl", segments(9))
    with caplog.at_level(logging.WARNING):
        run(replace(job, on_duplicate="first"), in_process)
    assert "of 9 rows that were looked at, 6 repeat an id and will be dropped" in caplog.text


@pytest.mark.parametrize("bad", [{"docid": None}, {"docid": 1.5}, {"text": None}, {"text": ["x"]}])
def test_null_and_foreign_fields_are_refused_before_the_device_is_used(job, tmp_path, bad):
    write(tmp_path / "c.jsonl", [{"docid": str(i), "text": "a"} | bad for i in range(5)])
    with pytest.raises(TooManyRejectsError) as refused:
        run(job, never)
    assert "5 rows were rejected, 0 of 5 may be" in str(refused.value)
    assert "none is encoded yet" in str(refused.value)
    found = RejectStore(Location(job.uri)).read()
    assert [(r.line, next(iter(bad)) in r.reason) for r in found] == [
        (n, True) for n in range(1, 6)
    ]
    write(tmp_path / "c.jsonl", [{"docid": str(i), "text": "a"} for i in range(5)])
    assert run(job, in_process).num_rows == 5
    assert RejectStore(Location(job.uri)).read() == []


def test_raising_max_rejected_is_a_remedy_too(job, tmp_path):
    write(tmp_path / "c.jsonl", [{"id": i or None, "text": "a"} for i in range(5)])
    with pytest.raises(TooManyRejectsError, match="raise --max-rejected"):
        run(job, never)
    summary = run(replace(job, max_rejected=0.2), in_process)
    assert (summary.num_rows, summary.num_rejected) == (4, 1)


def test_naming_the_text_field_is_a_remedy_too(job, tmp_path):
    write(tmp_path / "c.jsonl", [{"id": i, "text": None, "words": "a"} for i in range(5)])
    with pytest.raises(TooManyRejectsError, match="--text-field"):
        run(job, never)
    assert run(replace(job, fields=FieldOptions(text="words")), in_process).num_rows == 5


def test_rows_without_text_are_announced(job, tmp_path, caplog):
    write(tmp_path / "c.jsonl", [{"id": i, "text": "", "words": "a"} for i in range(5)])
    with caplog.at_level(logging.WARNING):
        run(job, in_process)
    assert "of 5 rows that were looked at, 5 have no text" in caplog.text
    assert "--text-field" in caplog.text


def test_a_copy_of_a_file_is_found_among_many(job, tmp_path, monkeypatch):
    monkeypatch.setattr(first_look, "MOST_ROWS", 40)
    for name in range(30):
        write(tmp_path / f"{name:02}.jsonl", [{"id": f"{name}-{i}", "text": ""} for i in range(9)])
    write(tmp_path / "copy.jsonl", [{"id": f"17-{i}", "text": ""} for i in range(9)])
    with pytest.raises(
        InputError, match=r"4 repeat an id, such as '17-0' in .*17.jsonl line 1 and"
    ):
        run(job, never)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_every_format_is_looked_at(job, tmp_path, kind):
    path = tmp_path / f"c.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("id", "text"), ("a", "x\ny"), ("a", "z")])
    else:
        pq.write_table(pa.table({"id": ["a", "a"], "text": ["x", "z"]}), path)
    with pytest.raises(InputError, match="1 repeat an id"):
        run(replace(job, inputs=(str(path),)), never)


def test_the_look_is_short_at_any_size(job, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", ({"id": i, "text": name} for i in range(60_000)))
    shards = some_shards(plan_job(replace(job, shard_size=1000)))
    assert {0, 60} < {shard.number for shard in shards}
    assert len(shards) <= 10
    assert len(some_shards(plan_job(replace(job, shard_size=50_000)))) == 1


def test_a_resumed_job_is_not_looked_at_again(job, tmp_path):
    write(tmp_path / "c.jsonl", [{"id": i, "text": "a"} for i in range(8)])

    def half(config, shards):
        yield next(in_process(config, shards))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job, half)
    (tmp_path / "t.lance" / "_kalm" / "rejects").mkdir()
    (tmp_path / "t.lance" / "_kalm" / "rejects" / "x.jsonl").write_text(
        '{"path": "p", "line": 1, "reason": "r", "id": null}\n'
    )
    assert run(job, in_process).num_rows == 8
    assert len(RejectStore(Location(job.uri)).read()) == 1
    assert len(PassageTable.open(job.uri)) == 8
