"""A comparison in pieces and partitions finds what one in a single piece does, and is resumed."""

import json
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lance
import pytest

from pipeline.corpus.passages import FieldOptions
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.table import finish, partitions
from pipeline.upkeep.comparison import corpus as pieces
from pipeline.upkeep.sync import sync
from pipeline.upkeep.verify import verify
from pipeline.workers.local import in_process
from tests.support.commands import HANG_S

ROWS = 60
COLUMNS = ("id", "text", "year")
KILLED = """
import os, signal, sys
from dataclasses import replace
from pipeline.run.job import EncodeJob
from pipeline.table import partitions
from pipeline.upkeep.comparison import corpus
from pipeline.upkeep.sync import sync
from pipeline.workers.local import in_process
from tests.pipeline.upkeep.test_compare import KEPT

corpus.PIECE_ROWS, partitions.PARTITION_ROWS = 10, 25
file, uri, model, most, kinds = sys.argv[1:]
done = []

def execute(work, units):
    for outcome in in_process(work, units):
        if type(work).__name__ in kinds.split(","):
            if len(done) == int(most):
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(outcome)
        yield outcome

job = EncodeJob(inputs=(file,), uri=uri, model=model, shard_size=5, fields=KEPT)
sync(job, execute, delete_missing=True)
"""
"""Syncs in small pieces, and is killed by SIGKILL at the nth part of some steps."""
KEPT = FieldOptions(keep=(("year", "int64"),))


def write(file, rows):
    lines = (json.dumps({"id": i, "text": t, "year": y}) + "\n" for i, (t, y) in rows.items())
    file.write_text("".join(lines))


def rows_of(uri):
    """Return the rows that readers see, in the order of the table."""
    table = lance.dataset(str(uri), version="live").to_table(columns=list(COLUMNS))
    return list(zip(*(table[name].to_pylist() for name in COLUMNS), strict=True))


def staged(uri):
    return [file for file in Path(uri, "_kalm/sync").rglob("*") if file.is_file()]


@pytest.fixture
def in_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_ROWS", 10)
    monkeypatch.setattr(partitions, "PARTITION_ROWS", 25)


@pytest.fixture(scope="module")
def encoded(model_dir, tmp_path_factory):
    """A job over a table, and a corpus from which it differs in all ways."""
    folder = tmp_path_factory.mktemp("compare")
    draw = random.Random(3)
    held = {f"p{i}": (f"text {i}", i) for i in range(ROWS)}
    write(folder / "c.jsonl", held)
    job = EncodeJob(
        inputs=(str(folder / "c.jsonl"),), uri=str(folder / "t.lance"), model=str(model_dir),
        shard_size=5, fields=KEPT,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "FRAGMENT_ROWS", 10)
        run(job, in_process)
    rows = dict(held)
    for i, id in enumerate(draw.sample(sorted(rows), 24)):
        if i < 8:
            rows[id] = (f"changed {i}", 1)
        elif i < 16:
            rows[id] = (rows[id][0], -1)
        else:
            del rows[id]
    rows |= {f"n{i}": (f"new {i}", i) for i in range(7)}
    ids = sorted(rows)
    draw.shuffle(ids)
    rows = {id: rows[id] for id in ids}
    write(folder / "new.jsonl", rows)
    return replace(job, inputs=(str(folder / "new.jsonl"),)), rows


def copy_of(job, folder):
    shutil.copytree(job.uri, folder / "t.lance")
    return replace(job, uri=str(folder / "t.lance"))


def test_pieces_change_nothing(encoded, tmp_path, request):
    job, rows = encoded
    whole = copy_of(job, tmp_path)
    first, _ = sync(whole, in_process, delete_missing=True)
    assert first.counts() == {
        "unchanged": 36, "changed": 8, "metadata_changed": 8, "new": 7, "missing": 8, "surplus": 0,
        "rejected": 0,
    }  # fmt: skip
    assert {id: (text, year) for id, text, year in rows_of(whole.uri)} == rows

    request.getfixturevalue("in_pieces")
    (tmp_path / "other").mkdir()
    parted = copy_of(job, tmp_path / "other")
    for _ in range(2):
        dry, _ = sync(parted, in_process, dry_run=True)
        assert len(dry.to_encode.counts) > 5 and len(dry.to_encode.files) > 2
        assert (dry.counts(), dry.digest) == (first.counts(), first.digest)
        assert not staged(parted.uri), "a dry run leaves nothing"
    assert verify(parted.uri, inputs=job.inputs, fields=KEPT).num_problems == 4
    second, _ = sync(parted, in_process, delete_missing=True)
    assert (second.counts(), second.update_digest) == (first.counts(), first.update_digest)
    here, there = rows_of(parted.uri), rows_of(whole.uri)
    assert (here[:36], sorted(here)) == (there[:36], sorted(there)), (
        "unchanged rows keep their order"
    )
    assert not staged(parted.uri)
    assert verify(parted.uri, inputs=job.inputs, fields=KEPT).num_problems == 0


@pytest.mark.parametrize(
    ("kinds", "most", "left"),
    [
        ("CorpusSide,TableSide", 4, [2, 6, 5]),
        pytest.param("JoinWork", 2, [0, 0, 3], marks=pytest.mark.slow),
        pytest.param("DeltaWork", 2, [0, 0, 0], marks=pytest.mark.slow),
        pytest.param("EncodeWork", 1, [0, 0, 0], marks=pytest.mark.slow),
        ("UpdatesWork", 3, [0, 0, 0]),
        ("CopyRows", 1, [0, 0, 0]),
        pytest.param("DeleteRows", 0, [0, 0, 0], marks=pytest.mark.slow),
        ("DeleteRows", 1, [6, 8, 6]),  # what is merged in by then is compared again
    ],
)
def test_a_killed_sync_is_finished(encoded, in_pieces, tmp_path, kinds, most, left):
    job, rows = encoded
    table = copy_of(job, tmp_path)
    before = rows_of(table.uri)
    command = [sys.executable, "-c", KILLED, *job.inputs, table.uri, job.model, str(most), kinds]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert rows_of(table.uri) == before, "readers see all of it or nothing"
    done = []

    def execute(work, units):
        for outcome in in_process(work, units):
            done.append(type(work).__name__)
            yield outcome

    sync(table, execute, delete_missing=True)
    assert len(rows_of(table.uri)) == len(rows)
    assert {id: (text, year) for id, text, year in rows_of(table.uri)} == rows
    assert verify(table.uri, inputs=job.inputs, fields=KEPT).num_problems == 0
    assert not staged(table.uri)
    assert [done.count(kind) for kind in ("CorpusSide", "TableSide", "JoinWork")] == left
