"""A table that follows a feed, or the versions of a source, equals one that is synced in full."""

import json
import random
import re
import shutil
import signal
from dataclasses import replace

import lance
import pyarrow as pa
import pytest

from kalm_encoder.errors import InputError
from pipeline.corpus.passages import FieldOptions
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.table.claim import TableClaim
from pipeline.table.rejects import RejectStore
from pipeline.upkeep.sync import sync
from pipeline.upkeep.verify import verify
from pipeline.workers.local import in_process
from tests.conftest import write_corpus
from tests.support.commands import kalm
from tests.support.s3_server import serve

KILLS = 4
"""Requests between the merge and the end at which a sync is killed."""
START = {f"p{i}": f"text {i}" for i in range(12)}


@pytest.fixture
def job(model_dir, tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", list(START.values()))
    uri = str(tmp_path / "t.lance")
    job = EncodeJob(inputs=(str(corpus),), uri=uri, model=str(model_dir), shard_size=6)
    run(job, in_process)
    return job


def held(job):
    rows = lance.dataset(job.uri, version="live").to_table(columns=["id", "text"])
    return dict(zip(rows["id"].to_pylist(), rows["text"].to_pylist(), strict=True))


def upsert(id, text):
    return {"op": "upsert", "_id": id, "text": text}


def write_feed(file, records):
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return (str(file),)


def encoded(summary):
    return summary.num_rows if summary else 0


def test_random_changes_and_replays_equal_the_corpus(job, tmp_path):
    draw, corpus, records = random.Random(4), dict(START), []
    feeds = []
    for step in range(4):
        for number in range(6):
            id = f"p{draw.randrange(16)}"
            if draw.random() < 0.3:
                records.append({"op": "delete", "_id": id})
                corpus.pop(id, None)
            else:
                corpus[id] = f"text {step}.{number}"
                records.append(upsert(id, corpus[id]))
        feeds.append(write_feed(tmp_path / f"feed{step}.jsonl", records))
        follow = replace(job, inputs=feeds[-1])
        sync(follow, in_process, is_feed=True)
        assert held(job) == corpus
        for old in feeds:  # replays, of which all but the last are behind the table
            changes, summary = sync(replace(job, inputs=old), in_process, is_feed=True)
            assert summary is None
            assert (changes.changed, changes.new, changes.missing) == (0, 0, 0)
    assert held(job) == corpus
    whole = write_corpus(tmp_path / "whole.jsonl", [])
    whole.write_text("".join(json.dumps({"_id": i, "text": t}) + "\n" for i, t in corpus.items()))
    changes, _ = sync(replace(job, inputs=(str(whole),)), in_process, delete_missing=True)
    assert (changes.changed, changes.new, changes.missing) == (0, 0, 0)
    assert verify(job.uri, inputs=(str(whole),)).num_problems == 0


def test_only_what_is_new_in_a_feed_is_looked_at(job, tmp_path):
    first = [upsert("p1", "one"), {"op": "delete", "_id": "p2"}]
    file = tmp_path / "feed.jsonl"
    follow = replace(job, inputs=write_feed(file, first))
    assert sync(follow, in_process, is_feed=True)[0].changed == 1
    sync(replace(job, inputs=write_feed(tmp_path / "o.jsonl", [upsert("p1", "two")])), in_process)
    write_feed(file, [*first, upsert("p3", "three"), upsert("p3", "four")])
    changes, summary = sync(follow, in_process, is_feed=True)
    assert (changes.changed, changes.unchanged, encoded(summary)) == (1, 0, 1)
    assert (held(job)["p1"], held(job)["p3"], "p2" in held(job)) == ("two", "four", False)


def test_a_feed_that_does_not_continue_is_compared_whole_and_that_is_said(job, tmp_path, caplog):
    one, more = upsert("p1", "one"), upsert("x", "y")
    for file, records in (("a", [one]), ("b", [more, one])):
        feed = replace(job, inputs=write_feed(tmp_path / f"{file}.jsonl", records))
        changes, summary = sync(feed, in_process, is_feed=True)
    assert "do not continue what was applied" in caplog.text
    assert (changes.unchanged, changes.new, encoded(summary)) == (1, 1, 1)


def test_a_file_that_was_applied_with_others_and_one_of_deletions_alone(job, tmp_path):
    first, last, gone = (
        write_feed(tmp_path / f"{name}.jsonl", [record])
        for name, record in (
            ("a", upsert("p1", "old")),
            ("b", upsert("p1", "new")),
            ("c", {"op": "delete", "_id": "p2"}),
        )
    )
    for inputs in (first + last, first, gone, first + last):
        sync(replace(job, inputs=inputs), in_process, is_feed=True)
    after = {**START, "p1": "new"}
    del after["p2"]
    assert held(job) == after


def test_records_that_are_no_change_are_rejects(job, tmp_path):
    records = [
        {"op": "replace", "_id": "p1", "text": "no"},
        upsert("p2", None),
        upsert("p3", "yes"),
    ]
    feed = write_feed(tmp_path / "feed.jsonl", records)
    changes, _ = sync(replace(job, inputs=feed), in_process, is_feed=True)
    assert (changes.changed, changes.rejected) == (1, 2)
    found = [(r.line, r.id, r.reason) for r in RejectStore(job.table).read("sync")]
    assert found[0][:2] == (2, "p2")
    assert found[1] == (1, "p1", "field 'op' holds 'replace', neither upsert nor delete")
    assert held(job) == {**START, "p3": "yes"}
    with pytest.raises(InputError, match="holds no JSON lines"):
        csv = tmp_path / "c.csv"
        csv.write_text("id,text\na,b\n")
        sync(replace(job, inputs=(str(csv),)), in_process, is_feed=True)


def test_killed_between_merge_and_publish_the_same_command_finishes(job, tmp_path, monkeypatch):
    records = [upsert("p1", "one"), {"op": "delete", "_id": "p2"}]
    follow = replace(job, inputs=write_feed(tmp_path / "feed.jsonl", records))
    after = {**START, "p1": "one"}
    del after["p2"]
    change, commits = TableClaim.change, []

    def killed(self, metadata):
        commits.append(metadata)
        raise KeyboardInterrupt

    monkeypatch.setattr(TableClaim, "change", killed)
    with pytest.raises(KeyboardInterrupt):
        sync(follow, in_process, is_feed=True)
    assert held(job) == START, "readers see all of it or nothing"
    monkeypatch.setattr(TableClaim, "change", change)
    sync(follow, in_process, is_feed=True)
    assert held(job) == after
    assert sync(follow, in_process, is_feed=True)[1] is None


def test_since_a_version_of_a_source_table(job, tmp_path, caplog):
    path = str(tmp_path / "source.lance")
    rows = [{"id": i, "text": t} for i, t in START.items()]
    source = lance.write_dataset(
        pa.Table.from_pylist(rows), path, enable_stable_row_ids=True, max_rows_per_file=5
    )
    follow = replace(job, inputs=(path,), shard_size=4)
    first = source.version
    sync(follow, in_process, since=first)  # nothing is known of this source yet
    assert re.search(r"was not synced from version \d+ of .*: all rows are compared", caplog.text)
    caplog.clear()
    new = pa.Table.from_pylist([{"id": "p1", "text": "one"}, {"id": "n", "text": "new"}])
    source.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(new)
    source.delete("id = 'p5'")
    changes, summary = sync(follow, in_process, since=first)
    assert caplog.text == ""
    assert (changes.changed, changes.new, changes.unchanged) == (1, 1, 0)
    assert (changes.missing, encoded(summary)) == (1, 2)
    after = {**START, "p1": "one", "n": "new"}
    del after["p5"]
    assert held(job) == after
    with pytest.raises(InputError, match="give one Lance table"):
        sync(job, in_process, since=1)


@pytest.mark.parametrize("mode", ["append", "overwrite"])
def test_rows_of_a_source_that_were_written_again_stay(job, tmp_path, mode):
    path = str(tmp_path / "source.lance")
    rows = [{"id": i, "text": t} for i, t in START.items()]
    source = lance.write_dataset(pa.Table.from_pylist(rows), path, enable_stable_row_ids=True)
    follow = replace(job, inputs=(path,))
    sync(follow, in_process)
    first = source.version
    source.delete("id in ('p5', 'p6', 'p7')")
    again = [{"id": "p5", "text": "again"}, {"id": "p6", "text": START["p6"]}]
    if mode == "overwrite":
        again += [row for row in rows if row["id"] not in ("p5", "p6", "p7")]
    lance.write_dataset(pa.Table.from_pylist(again), path, mode=mode, enable_stable_row_ids=True)
    sync(follow, in_process, since=first)
    after = {**START, "p5": "again"}
    del after["p7"]
    assert held(job) == after


def test_a_version_of_a_source_without_the_ids_is_compared_as_a_whole(job, tmp_path, caplog):
    path = str(tmp_path / "source.lance")
    rows = pa.Table.from_pylist([{"id": i, "text": t} for i, t in START.items()])
    source = lance.write_dataset(rows, path, enable_stable_row_ids=True)
    follow = replace(job, inputs=(path,))
    sync(follow, in_process)
    first = source.version
    source.add_columns({"key": "concat(id, '-2')"})
    sync(replace(follow, fields=FieldOptions(id="key")), in_process, since=first)
    assert "has no column 'key': all rows are compared" in caplog.text
    assert held(job) == {**START, **{f"{i}-2": t for i, t in START.items()}}


@pytest.mark.slow
def test_killed_at_any_request_the_same_command_finishes(job, tmp_path):
    """SIGKILL at requests to a store, from the claim of the table to the moved tag."""
    records = [upsert("p1", "one"), {"op": "delete", "_id": "p2"}, upsert("new", "two")]
    (feed,) = write_feed(tmp_path / "feed.jsonl", records)
    after = {**START, "p1": "one", "new": "two"}
    del after["p2"]
    model = ("--model", job.model, "--workers", 0)
    with serve(tmp_path / "s3") as s3:

        def begin(name, *rules):
            """Sync a copy of the table, whose name Lance has cached nothing of."""
            copy = s3.folder / "bucket" / f"{name}.lance"
            shutil.copytree(job.uri, copy)
            to = ("--to", f"s3://bucket/{name}.lance")
            s3.faults(*rules)
            return copy, ("sync", feed, "--changes", *to, *model, *s3.arguments)

        kalm(*begin("whole")[1], check=0)
        requests = s3.stats()["requests"]
        merged = next(i for i, line in enumerate(requests) if "/_deletions/" in line)
        killed = 0
        for number in range(merged, len(requests), max(1, (len(requests) - merged) // KILLS)):
            rule = {"action": "kill_after", "match": "", "skip": number}
            copy, command = begin(f"t{number}", rule)
            killed += kalm(*command).returncode == -signal.SIGKILL
            here = replace(job, uri=str(copy))
            assert held(here) in (START, after), "readers see all of it or nothing"
            s3.faults()
            kalm(*command, check=0)
            assert held(here) == after
            assert verify(here.uri).num_problems == 0
    assert killed > KILLS // 2
