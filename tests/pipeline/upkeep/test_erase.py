"""What is erased is in no object of the table any more, whatever happened before and on the way."""

import json
import shutil
import signal
import threading
from pathlib import Path

import lance
import numpy as np
import pytest

from kalm_encoder import PassageTable
from kalm_encoder.errors import InputError, KalmError
from kalm_encoder.table.location import Location
from pipeline.corpus.erased import ERASED_REASON
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.table.rejects import RejectStore
from pipeline.upkeep.comparison import corpus as corpus_module
from pipeline.upkeep.comparison.differences import JoinWork
from pipeline.upkeep.comparison.sides import CorpusSide
from pipeline.upkeep.delete import delete
from pipeline.upkeep.delta import DeltaWork
from pipeline.upkeep.erase import erase
from pipeline.upkeep.sync import sync
from pipeline.upkeep.truncate import truncate
from pipeline.upkeep.verify import verify
from pipeline.workers.encode_work import EncodeWork
from pipeline.workers.local import in_process
from tests.conftest import make_texts, write_corpus
from tests.support.commands import kalm
from tests.support.s3_server import serve

ERASED = ["p3", "p17", "p18"]
KILLS = 8
"""Requests at which an erasure is killed; `make faults` has no scenario of its own for it."""
IDS = [f"p{i}" for i in range(30)]


def texts_with_markers():
    return [f"marker{i:03d}{chr(97 + i % 26) * 3} {t}" for i, t in enumerate(make_texts(30))]


def traces(folder: Path, texts, states) -> set[str]:
    """Which of the erased passages are found in a file, by a word of the text or their states."""
    found = set()
    for file in folder.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        for id in ERASED:
            word = texts[int(id[1:])].split()[0].encode()
            if word in content or states[id] in content:
                found.add(id)
    return found


@pytest.fixture
def made(model_dir, tmp_path):
    """A table that was encoded and synced: its job, its folder, its texts, states of some rows."""
    texts = texts_with_markers()
    corpus = write_corpus(tmp_path / "c.jsonl", ["an older text", *texts[1:-1]])
    folder = tmp_path / "t.lance"
    job = EncodeJob(
        inputs=(str(corpus),), uri=str(folder), model=str(model_dir), shard_size=8, ratios=(4, 16)
    )
    run(job, in_process)
    write_corpus(corpus, texts)
    sync(job, in_process)
    taken = PassageTable.open(job.uri).take(ERASED)
    states = {id: np.asarray(p.states).tobytes()[:64] for id, p in zip(ERASED, taken, strict=True)}
    assert traces(folder, texts, states) == set(ERASED)
    return job, folder, texts, states


def test_nothing_of_the_erased_passages_is_left(made, tmp_path):
    job, folder, texts, states = made
    delete(Location(job.uri), ["p18"])  # which leaves its bytes where they are
    assert traces(folder, texts, states) == set(ERASED)
    ids, certificate = tmp_path / "ids.txt", tmp_path / "certificate.json"
    ids.write_text("\n".join(ERASED))
    done = kalm(
        "erase", job.uri, "--ids-file", ids, "--wait", 0, "--certificate", certificate, check=0
    )
    assert "erased 2 passages" in done.stdout
    assert traces(folder, texts, states) == set()
    assert verify(job.uri).num_problems == 0
    table = PassageTable.open(job.uri)
    assert len(table) == 27
    assert [hit for hit, _ in table.search("marker004eee", 1)] == ["p4"], "the index is whole"
    written = json.loads(certificate.read_text())
    assert len(written["ids"]) == 3
    assert any(path.startswith("data/") for path in written["objects_removed"])
    assert not any(id in certificate.read_text() for id in ERASED)


def test_a_corpus_does_not_bring_them_back(made, tmp_path):
    job, folder, texts, states = made
    erase(Location(job.uri), ERASED, wait_s=0)
    changes, _ = sync(job, in_process)
    assert (changes.unchanged, changes.new, changes.rejected) == (27, 0, 3)
    rejects = RejectStore(Location(job.uri)).read()
    assert [(r.line, r.reason, r.id) for r in rejects] == [
        (line, ERASED_REASON, None) for line in (4, 18, 19)
    ]
    assert verify(job.uri, inputs=job.inputs).num_problems == 0
    truncate(job.uri, str(tmp_path / "r16.lance"), ratios=(16,))
    for uri in (job.uri, str(tmp_path / "r16.lance")):
        again = EncodeJob(
            inputs=job.inputs, uri=uri, model=job.model, ratios=(8,), new_generation=True
        )
        assert (run(again, in_process).num_rows, len(PassageTable.open(uri))) == (27, 27)
    assert traces(folder, texts, states) == set()


def test_by_a_predicate_while_readers_read(made):
    job, folder, texts, states = made
    stop, read = threading.Event(), []

    def reader():
        while not stop.is_set():
            read.append(len(PassageTable.open(job.uri).take(IDS[4:16])))

    thread = threading.Thread(target=reader)
    thread.start()
    certificate = erase(Location(job.uri), where="id IN ('p3', 'p17', 'p18')", wait_s=1)
    stop.set()
    thread.join()
    assert set(read) == {12}, "no reader failed"
    assert certificate["rows_deleted"] == 3
    assert traces(folder, texts, states) == set()


def test_a_version_that_somebody_keeps_is_named_and_nothing_is_done(made):
    job, *_ = made
    dataset = lance.dataset(job.uri)
    with pytest.raises(InputError, match="the predicate 'nobody = 1' is refused"):
        erase(Location(job.uri), where="nobody = 1")
    dataset.tags.create("audit", dataset.version)
    with pytest.raises(InputError, match="the tag 'audit' keeps version"):
        erase(Location(job.uri), ERASED)
    assert lance.dataset(job.uri).version == dataset.version
    dataset.tags.delete("audit")
    again = EncodeJob(
        inputs=job.inputs, uri=job.uri, model=job.model, ratios=(8,), new_generation=True
    )
    run(again, in_process)
    with pytest.raises(InputError, match=r"generation 2 of .* is not live"):
        erase(Location(job.uri), ERASED)


@pytest.mark.slow
def test_killed_at_any_request_the_same_command_finishes_it(made, tmp_path):
    """SIGKILL before and after requests to a store, spread over the whole of an erasure."""
    _, folder, texts, states = made
    (tmp_path / "ids.txt").write_text("\n".join(ERASED))
    with serve(tmp_path / "s3") as s3:
        copy, uri = s3.folder / "bucket" / "t.lance", "s3://bucket/t.lance"
        command = ("erase", uri, "--ids-file", tmp_path / "ids.txt", "--wait", 0, *s3.arguments)

        def begin(*rules):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy)
            s3.faults(*rules)
            return kalm(*command).returncode

        assert begin() == 0
        count, killed = len(s3.stats()["requests"]), 0
        for number in range(0, count, max(1, count // KILLS)):
            action = ("kill_before", "kill_after")[killed % 2]
            code = begin({"action": action, "match": "", "skip": number})
            killed += code == -signal.SIGKILL
            PassageTable.open(uri, storage_options=s3.options).take(IDS[4:16])
            s3.faults()
            kalm(*command, check=0)
            assert traces(copy, texts, states) == set()
            assert verify(uri, storage_options=s3.options).num_problems == 0
    assert killed > KILLS // 2


@pytest.mark.parametrize("step", [CorpusSide, JoinWork, DeltaWork, EncodeWork])
@pytest.mark.parametrize("late", [False, True])
def test_a_sync_that_an_erasure_overtakes_leaves_nothing_staged(made, monkeypatch, step, late):
    """The erasure comes before the workers of a step write, or after them."""
    job, folder, texts, _ = made
    monkeypatch.setattr(corpus_module, "PIECE_ROWS", 10)  # else little is written beside the table

    def overtaken(work, units):
        if not isinstance(work, step):
            yield from in_process(work, units)
            return
        done = list(in_process(work, units)) if late else []
        erase(Location(job.uri), ["p3"], wait_s=0)
        yield from done or in_process(work, units)

    write_corpus(Path(job.inputs[0]), [*texts[:3], "markerwritten", *texts[4:]])
    with pytest.raises(KalmError):
        sync(job, overtaken)
    staged = folder / "_kalm" / "sync"
    assert not [file for file in staged.rglob("*") if file.is_file()]
