"""A table follows its corpus: only what changed is encoded, and readers never see half of it."""

import json
import os
import shutil
import time
from datetime import timedelta
from pathlib import Path

import lance
import numpy as np
import pytest

from kalm_encoder import PassageEncoder, PassageTable
from kalm_encoder.errors import InputError, MismatchError, MissingIdsError
from kalm_encoder.table.location import Location
from pipeline.corpus.passages import Reject
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.table.finish import SealedTable
from pipeline.table.publish import publish, rollback
from pipeline.table.rejects import RejectStore
from pipeline.upkeep.delete import compact, delete
from pipeline.upkeep.garbage import collect_garbage
from pipeline.upkeep.sync import retry_rejects, sync
from pipeline.upkeep.verify import verify
from pipeline.workers import shard_encoder as encode_shard
from pipeline.workers.local import in_process
from tests.conftest import make_texts, write_corpus
from tests.support.random_model import make_checkpoint


@pytest.fixture
def job(model_dir, tmp_path):
    """A job over `c.jsonl`, encoded: 50 passages in 5 shards."""
    corpus = write_corpus(tmp_path / "c.jsonl", make_texts(50))
    made = EncodeJob(
        inputs=(str(corpus),), uri=str(tmp_path / "t.lance"), model=str(model_dir), shard_size=10
    )
    run(made, in_process)
    return made


def rewrite(job, passages):
    lines = [json.dumps({"_id": i, "text": t}) + "\n" for i, t in passages.items()]
    with open(job.inputs[0], "w", encoding="utf-8") as file:
        file.writelines(lines)


def passages_of(job):
    with open(job.inputs[0], encoding="utf-8") as file:
        return {row["_id"]: row["text"] for row in map(json.loads, file)}


def count_encoded(monkeypatch):
    """Count the passages that reach the encoder."""
    counts = []
    real = PassageEncoder.start

    def counting(self, tokens, **how):
        counts.append(len(tokens))
        return real(self, tokens, **how)

    monkeypatch.setattr(PassageEncoder, "start", counting)
    return counts


def assert_same_rows(uri, other):
    """Equal as sets of rows, but for where a row came from; states to the last bit of float16."""
    rows = []
    for table in (uri, other):
        found = lance.dataset(str(table), version="live").to_table().to_pylist()
        rows.append({row["id"]: row for row in found})
        assert len(rows[-1]) == len(found)
    assert rows[0].keys() == rows[1].keys()
    for id, row in rows[0].items():
        for name in ("text", "text_hash", "num_tokens", "truncated"):
            assert row[name] == rows[1][id][name]
        # A passage's batch may differ, and with it the last bit of the float16 rounding.
        a, b = np.array(row["states_r4"]), np.array(rows[1][id]["states_r4"])
        np.testing.assert_allclose(a, b, rtol=2**-10, atol=2**-14)


def test_only_what_changed_is_encoded(job, tmp_path, monkeypatch):
    passages = passages_of(job)
    passages["p3"] = "something else"
    passages["q"] = "brand new"
    del passages["p40"]
    rewrite(job, passages)
    changes, _ = sync(job, in_process, dry_run=True)
    assert (changes.unchanged, changes.changed, changes.new, changes.missing) == (48, 1, 1, 1)
    before = lance.dataset(job.uri).version
    encoded = count_encoded(monkeypatch)
    changes, summary = sync(job, in_process, delete_missing=True)
    assert sum(encoded) == 2
    assert summary.num_rows == 2
    assert before < PassageTable.open(job.uri).version
    fresh = tmp_path / "fresh.lance"
    run(EncodeJob(inputs=job.inputs, uri=str(fresh), model=job.model), in_process)
    assert_same_rows(job.uri, fresh)
    assert verify(job.uri).num_problems == 0
    assert PassageTable.open(job.uri).search("brand", 1)[0][0] == "q"
    plan = PassageTable.open(job.uri).dataset.scanner(filter="id = 'q'").explain_plan()
    assert "ScalarIndexQuery" in plan
    encoded.clear()
    changes, summary = sync(job, in_process, delete_missing=True)
    assert (changes.unchanged, encoded, summary) == (50, [], None)


def test_missing_passages_stay_unless_told(job):
    rewrite(job, {"p1": make_texts(50)[1]})
    changes, summary = sync(job, in_process)
    assert (changes.unchanged, changes.missing, summary) == (1, 49, None)
    assert len(PassageTable.open(job.uri)) == 50
    sync(job, in_process, delete_missing=True)
    assert len(PassageTable.open(job.uri)) == 1


@pytest.mark.parametrize("step", ["merge", "delete", "_index", "change", "publish"])
def test_readers_see_old_or_new_and_an_interrupted_sync_is_finished(job, monkeypatch, step):
    passages = passages_of(job)
    old = set(passages)
    passages |= {"p0": "changed", "new": "new"}
    del passages["p9"]
    rewrite(job, passages)

    class KillError(BaseException):
        pass

    def kill(*args, **kwargs):
        raise KillError

    with monkeypatch.context() as broken:
        if step == "publish":
            broken.setattr("pipeline.upkeep.apply.publish", kill)
        else:
            broken.setattr(SealedTable, step, kill)
        with pytest.raises(KillError):
            sync(job, in_process, delete_missing=True)
    ids = lance.dataset(job.uri, version="live").to_table(columns=["id"])["id"].to_pylist()
    assert set(ids) == old
    encoded = count_encoded(monkeypatch)
    sync(job, in_process, delete_missing=True)
    assert sum(encoded) == 0, "what was encoded before the interruption is kept"
    table = PassageTable.open(job.uri)
    assert set(table.dataset.to_table(columns=["id"])["id"].to_pylist()) == set(passages)
    assert verify(job.uri).num_problems == 0


def test_a_delete_that_was_killed_before_it_published_is_finished(job, monkeypatch):
    def kill(table):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr("pipeline.upkeep.delete.publish", kill)
        with pytest.raises(KeyboardInterrupt):
            delete(Location(job.uri), ["p1", "p2"])
    assert len(PassageTable.open(job.uri)) == 50
    assert delete(Location(job.uri), ["p1", "p2"]) == 2
    assert len(PassageTable.open(job.uri)) == 48
    with pytest.raises(MissingIdsError, match="p1"):
        delete(Location(job.uri), ["p1", "p3"])


@pytest.mark.parametrize(("policy", "text"), [("first", "one"), ("last", "two")])
def test_repeated_ids_in_the_new_corpus(job, policy, text):
    with open(job.inputs[0], "a", encoding="utf-8") as file:
        for value in ("one", "two"):
            file.write(json.dumps({"_id": "twice", "text": value}) + "\n")
    with pytest.raises(InputError, match=r"1 passages repeat an id of another: 'twice'"):
        sync(job, in_process)
    changes, _ = sync(job, in_process, on_duplicate=policy)
    assert (changes.unchanged, changes.new) == (50, 1)
    rows = lance.dataset(job.uri, version="live").to_table(filter="id = 'twice'")
    assert rows["text"].to_pylist() == [text]


def test_another_model_is_refused(job, encoder, tmp_path_factory):
    other = make_checkpoint(tmp_path_factory.mktemp("other") / "m", make_texts(300, seed=9))
    changed = EncodeJob(inputs=job.inputs, uri=job.uri, model=str(other))
    with pytest.raises(MismatchError, match="states of two models cannot be mixed"):
        sync(changed, in_process)


def test_encode_refuses_a_table_that_sync_changed(job):
    rewrite(job, {**passages_of(job), "new": "new"})
    sync(job, in_process)
    with pytest.raises(MismatchError, match="was changed by `kalm sync`"):
        run(job, in_process)


def test_rows_that_break_the_encoder_are_rejected_and_retried(model_dir, tmp_path, monkeypatch):
    texts = make_texts(20)
    texts[7] = "poison passage"
    corpus = write_corpus(tmp_path / "c.jsonl", texts)
    job = EncodeJob(
        inputs=(str(corpus),), uri=str(tmp_path / "t.lance"), model=str(model_dir),
        max_rejected=0.1,
    )  # fmt: skip
    real = PassageEncoder._start
    poison = PassageEncoder(str(model_dir)).tokenise(["poison passage"])[0].ids

    def breaks(self, tokens, *how):
        if any(np.array_equal(t.ids, poison) for t in tokens):
            raise RuntimeError("a kernel failed")
        return real(self, tokens, *how)

    with monkeypatch.context() as broken:
        broken.setattr(PassageEncoder, "_start", breaks)
        summary = run(job, in_process)
    assert (summary.num_rows, summary.num_rejected) == (19, 1)
    (reject,) = RejectStore(Location(job.uri)).read()
    assert (reject.line, reject.id) == (8, "p7")
    assert reject.reason == "the encoder failed: RuntimeError: a kernel failed"
    encoded = count_encoded(monkeypatch)
    again = retry_rejects(job, in_process)
    assert (sum(encoded), again.num_rows) == (1, 1)
    assert RejectStore(Location(job.uri)).read() == []
    assert len(PassageTable.open(job.uri).take(["p7"])) == 1
    assert verify(job.uri).num_problems == 0
    assert retry_rejects(job, in_process) is None


def test_a_retry_drops_what_is_in_the_table_and_keeps_what_is_still_unusable(job):
    (path,) = job.inputs
    held, unusable = Reject(path, 3, "it failed", "p2"), Reject(path, 999, "the text is empty", "q")
    store = RejectStore(Location(job.uri))
    store.write("some", [held, unusable])
    assert retry_rejects(job, in_process) is None
    assert store.read() == [unusable]


@pytest.mark.parametrize("split", [None, (64, 8)])
def test_a_retry_drops_rows_that_had_no_id_and_documents(model_dir, tmp_path, split):
    file = tmp_path / "c.jsonl"
    job = EncodeJob(
        inputs=(str(file),), uri=str(tmp_path / "t.lance"), model=str(model_dir), split=split,
        max_rejected=0.9,
    )  # fmt: skip
    rows = ['{"id": "a", "text": "one"}', '{"id": "b", "text": null}', '{"id": "c"', "{"]
    file.write_text("\n".join(rows))
    run(job, in_process)
    file.write_text(
        "\n".join([rows[0], rows[1].replace("null", '"two"'), rows[0].replace("a", "c")])
    )
    assert retry_rejects(job, in_process).num_rows == 2
    assert [reject.line for reject in RejectStore(job.table).read()] == [4]


def test_a_broken_device_rejects_nothing(model_dir, tmp_path, monkeypatch):
    """Where every passage fails the shard fails: its rows are not at fault."""
    corpus = write_corpus(tmp_path / "c.jsonl", make_texts(5))
    job = EncodeJob(inputs=(str(corpus),), uri=str(tmp_path / "t.lance"), model=str(model_dir))

    def breaks(self, tokens, *how):
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as broken:
        broken.setattr(encode_shard.PassageEncoder, "_start", breaks)
        with pytest.raises(Exception, match="the device is gone"):
            run(job, in_process)
    assert RejectStore(Location(job.uri)).read() == []
    assert run(job, in_process).num_rows == 5


def test_a_new_generation_is_switched_and_rolled_back(job):
    other = EncodeJob(
        inputs=job.inputs, uri=job.uri, model=job.model, ratios=(2, 8), shard_size=20,
        new_generation=True,
    )  # fmt: skip
    summary = run(other, in_process)
    assert (summary.num_rows, summary.live) == (50, False)
    assert PassageTable.open(job.uri).spec.ratios == (4,)
    assert run(other, in_process).shards_encoded == 0
    publish(Location(job.uri))
    assert PassageTable.open(job.uri).spec.ratios == (2, 8)
    assert verify(job.uri).num_problems == 0
    rollback(Location(job.uri))
    assert PassageTable.open(job.uri).spec.ratios == (4,)
    assert len(PassageTable.open(job.uri).take(["p1", "p49"])) == 2
    rollback(Location(job.uri))
    assert PassageTable.open(job.uri).spec.ratios == (2, 8)


def test_an_interrupted_generation_is_resumed(job):
    other = EncodeJob(
        inputs=job.inputs, uri=job.uri, model=job.model, ratios=(8,), shard_size=10,
        new_generation=True, commit_every_s=0,
    )  # fmt: skip

    def dies(config, shards):
        for i, outcome in enumerate(in_process(config, shards)):
            if i == 2:
                raise KeyboardInterrupt
            yield outcome

    with pytest.raises(KeyboardInterrupt):
        run(other, dies)
    assert len(PassageTable.open(job.uri).take(["p1"])) == 1  # the old one is still served
    with pytest.raises(MismatchError):
        run(job, in_process)  # the table is being made anew
    assert run(other, in_process).shards_encoded == 3
    assert verify(job.uri, version=lance.dataset(job.uri).version).num_problems == 0


def test_delete_compact_and_gc(job):
    with pytest.raises(MissingIdsError):
        delete(Location(job.uri), ["p1", "nobody"])
    assert len(PassageTable.open(job.uri)) == 50
    assert delete(Location(job.uri), ["p1", "p2", "p1"]) == 2
    with pytest.raises(MissingIdsError):
        PassageTable.open(job.uri).take(["p1"])
    compact(Location(job.uri))
    table = PassageTable.open(job.uri)
    assert len(table.dataset.get_fragments()) == 1
    assert verify(job.uri).num_problems == 0
    held = table.take(["p3"])[0]
    data = Path(job.uri, "data")
    file = next(data.iterdir())
    young, old = data / "young.lance", data / "old.lance"
    staged = Path(job.uri, "_kalm/sync/abandoned/encoded.lance/data/x.lance")
    staged.parent.mkdir(parents=True)
    for orphan in (young, old, staged):
        shutil.copy(file, orphan)
    for orphan in (old, staged):
        os.utime(orphan, (time.time() - 7200,) * 2)
    planned = collect_garbage(Location(job.uri), older_than=timedelta(0), dry_run=True)
    found = collect_garbage(Location(job.uri), older_than=timedelta(0))
    assert planned == found
    assert found.versions > 3
    assert young.exists() and not old.exists() and not staged.exists()
    np.testing.assert_array_equal(PassageTable.open(job.uri).take(["p3"])[0].states, held.states)
    rollback(Location(job.uri))  # a tagged version is never removed
    assert verify(job.uri).num_problems == 0


AGED = ["_kalm/sync/*/encoded.lance/data/*", "_kalm/sync/*/encoded.lance/_versions/*"]


@pytest.mark.parametrize("aged", AGED)
def test_what_a_stopped_sync_staged_is_removed_as_a_whole_or_not_at_all(job, monkeypatch, aged):
    passages = {**passages_of(job), "p1": "changed"}
    rewrite(job, passages)
    with monkeypatch.context() as patch:
        patch.setattr(SealedTable, "begin_change", stopped)
        with pytest.raises(KeyboardInterrupt):
            sync(job, in_process)
    table, old = Path(job.uri), time.time() - 8 * 86400
    for path in table.glob(aged):
        os.utime(path, (old, old))
    staged = [path for path in table.rglob("_kalm/sync/**/*") if path.is_file()]
    collect_garbage(Location(job.uri))
    assert all(path.exists() for path in staged)
    sync(job, in_process)
    assert verify(job.uri, inputs=job.inputs).num_problems == 0
    rewrite(job, {**passages, "p1": "again"})
    with monkeypatch.context() as patch:
        patch.setattr(SealedTable, "begin_change", stopped)
        with pytest.raises(KeyboardInterrupt):
            sync(job, in_process)
    for path in table.rglob("_kalm/sync/**/*"):
        os.utime(path, (old, old))
    collect_garbage(Location(job.uri))
    assert not [path for path in table.rglob("_kalm/sync/**/*") if path.is_file()]
    sync(job, in_process)
    assert verify(job.uri, inputs=job.inputs).num_problems == 0


def stopped(*_, **__):
    raise KeyboardInterrupt


def test_indexes_that_somebody_made_follow_a_sync_as_they_are(job):
    def make(*arguments, **options):
        lance.dataset(job.uri).create_scalar_index(*arguments, **options)

    make("text", "INVERTED", with_position=True, stem=False, language="German", replace=True)
    make("text", "NGRAM", name="trigrams")
    make("id", "BITMAP", name="id_idx", replace=True)
    make("num_tokens", "BTREE", name="by_length")

    def described():
        return {
            i.name: (i.index_type, i.details) for i in lance.dataset(job.uri).describe_indices()
        }

    before = described()
    rewrite(job, {**passages_of(job), "p1": "ein Zebra im Wald"})
    sync(job, in_process)
    dataset = lance.dataset(job.uri)
    assert described() == before and before["text_idx"][1]["with_position"]
    for index in dataset.describe_indices():
        assert dataset.stats.index_stats(index.name)["num_unindexed_rows"] == 0, index.name
    phrase = lance.query.PhraseQuery("Zebra im Wald", "text")
    for found in (
        dataset.to_table(full_text_query=phrase, columns=["id", "_score"]),
        dataset.to_table(filter="contains(text, 'Zebra')", columns=["id"]),
        dataset.to_table(filter="id = 'p1'", columns=["id"]),
    ):
        assert found["id"].to_pylist() == ["p1"]


def test_only_complete_versions_can_be_published(job):
    with pytest.raises(InputError, match=r"version 1 of .* is loading"):
        publish(Location(job.uri), 1)
    with pytest.raises(InputError, match="has no version 999"):
        publish(Location(job.uri), 999)
    with pytest.raises(InputError, match="no earlier published version"):
        rollback(Location(job.uri))
