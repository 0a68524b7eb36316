"""Verify and truncate on workers: the results of one process, and what a kill leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest

from kalm_encoder.errors import InputError
from kalm_encoder.table.checksums import states_checksum
from pipeline.corpus.passages import FieldOptions
from pipeline.upkeep.truncate import truncate
from pipeline.upkeep.verify import verify
from pipeline.workers.local import in_process
from pipeline.workers.on_ray.actor import OnRay, RayOptions
from tests.conftest import encode_table, make_texts

ROWS, FRAGMENT_ROWS = 60, 10


def write_table(uri, rows, schema):
    """Write rows as a live table of several fragments with an index of the ids."""
    table = pa.Table.from_pylist(rows, schema)
    dataset = lance.write_dataset(
        table, uri, max_rows_per_file=FRAGMENT_ROWS, max_rows_per_group=FRAGMENT_ROWS,
        data_storage_version="2.2", enable_stable_row_ids=True,
    )  # fmt: skip
    dataset.create_scalar_index("id", "BTREE")
    dataset = lance.dataset(uri)
    dataset.tags.create("live", dataset.version)
    return uri


def part_bytes(uri):
    """Return a size of parts that makes each fragment a part."""
    fragments = lance.dataset(uri).get_fragments()
    return 1 + max(sum(f.file_size_bytes for f in x.metadata.files) for x in fragments)


@pytest.fixture(scope="module")
def sound(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    lines = (
        json.dumps({"_id": f"p{i}", "text": text, "lang": "en"})
        for i, text in enumerate(make_texts(ROWS, seed=3))
    )
    (folder / "c.jsonl").write_text("\n".join(lines) + "\n")
    fields = FieldOptions(keep=(("lang", None),))
    encode_table(model_dir, folder / "c.jsonl", folder / "e.lance", ratios=(4, 16), fields=fields)
    encoded = lance.dataset(str(folder / "e.lance"), version="live").to_table()
    return write_table(str(folder / "s.lance"), encoded.to_pylist(), encoded.schema)


@pytest.fixture(scope="module")
def faulty(sound, tmp_path_factory):
    """A table with a fault of each kind."""
    whole = lance.dataset(sound).to_table()
    rows = whole.to_pylist()
    rows[3]["states_r4"][0][0] += 1
    rows[14]["text"] += "x"
    rows[25]["lang"] = "xx"
    rows[27]["num_tokens"] += 100
    rows[33] = rows[2]
    rows[38] = rows[2]
    rows[41]["shard_id"] = "another"
    rows[52]["states_r16"][0][0] = float("nan")
    states = np.array(rows[52]["states_r16"], np.float16)
    facts = (rows[52][name] for name in ("id", "num_tokens", "truncated"))
    rows[52]["checksum_r16"] = states_checksum(*facts, states)
    del rows[48]
    uri = write_table(str(tmp_path_factory.mktemp("faulty") / "t.lance"), rows, whole.schema)
    damaged = lance.dataset(uri).get_fragments()[1].metadata.files[0].path
    (Path(uri) / "data" / damaged).write_bytes(b"")
    return uri


def problems(report):
    return [(p.check, p.id) for p in report.problems]


def counting(execute):
    """Return an executor, and the number of units of each work that it was given."""
    given = []

    def counted(work, units):
        given.append((type(work).__name__, len(units)))
        yield from execute(work, units)

    return counted, given


def test_parts_find_what_one_finds(faulty):
    whole = verify(faulty)
    assert problems(whole) == [
        ("rows", "p3"),
        ("files", None),
        *[("rows", "p25"), ("rows", "p27"), ("rows", "p27"), ("rows", "p41"), ("rows", "p52")],
        *[("unique ids", "p2")] * 2,
        ("complete", None),
        ("look-up", None),
    ]
    assert whole.rows == ROWS - 11
    execute, given = counting(in_process)
    parts = verify(faulty, execute=execute, part_bytes=part_bytes(faulty))
    assert given == [("CheckRows", 6), ("FindRepeated", 1)]
    assert asdict(parts) == asdict(whole)


def test_workers_on_ray_give_what_one_process_gives(sound, faulty, tmp_path):
    with OnRay(RayOptions(num_workers=2, cpus_per_worker=1)) as execute:
        report = verify(faulty, execute=execute, part_bytes=part_bytes(faulty))
        truncate(sound, str(tmp_path / "ray.lance"), ratios=(8,), shard_size=10, execute=execute)
    assert asdict(report) == asdict(verify(faulty))
    truncate(sound, str(tmp_path / "one.lance"), ratios=(8,), shard_size=10)
    one, ray = (
        lance.dataset(str(tmp_path / f"{name}.lance")).to_table() for name in ("one", "ray")
    )
    assert one.equals(ray)


KILLED = """
import os, signal, sys
from pipeline.table.committer import Committer
from kalm_encoder.errors import InputError
from kalm_encoder.table.checksums import states_checksum
from pipeline.corpus.passages import FieldOptions
from pipeline.upkeep.truncate import truncate
from pipeline.upkeep.verify import verify
from pipeline.workers.local import in_process

Committer.commit_if_due = Committer.commit
left = int(sys.argv[1])

def killed(work, units):
    global left
    for outcome in in_process(work, units):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        yield outcome

"""


def killed_after(outcomes, call, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", KILLED + call, str(outcomes), *arguments],
        env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def test_a_killed_verification_goes_on_and_leaves_nothing(sound):
    size = part_bytes(sound)
    call = "verify(sys.argv[2], execute=killed, part_bytes=int(sys.argv[3]))"
    killed_after(4, call, sound, str(size))
    execute, given = counting(in_process)
    report = verify(sound, execute=execute, part_bytes=size)
    assert (report.rows, problems(report)) == (ROWS, [])
    assert given == [("CheckRows", 2), ("FindRepeated", 1)]
    assert not [path for path in (Path(sound) / "_kalm").rglob("*") if path.is_file()]


def test_a_part_that_had_problems_is_checked_again(faulty):
    """It was killed while it compared the ids; five of the six parts have problems."""
    size = part_bytes(faulty)
    call = "verify(sys.argv[2], execute=killed, part_bytes=int(sys.argv[3]))"
    killed_after(6, call, faulty, str(size))
    execute, given = counting(in_process)
    assert asdict(verify(faulty, execute=execute, part_bytes=size)) == asdict(verify(faulty))
    assert given[0] == ("CheckRows", 5)


def test_a_killed_truncate_goes_on(sound, tmp_path):
    target = str(tmp_path / "t.lance")
    call = "truncate(sys.argv[2], sys.argv[3], ratios=(8,), shard_size=10, execute=killed)"
    killed_after(4, call, sound, target)
    assert truncate(sound, target, ratios=(8,), shard_size=10).shards_encoded == 2
    truncate(sound, str(tmp_path / "one.lance"), ratios=(8,), shard_size=10)
    again, one = (lance.dataset(uri).to_table() for uri in (target, str(tmp_path / "one.lance")))
    assert again.equals(one)


def test_a_table_that_may_only_be_read_is_verified_and_the_log_says_what_that_costs(
    faulty, tmp_path, caplog
):
    uri = str(shutil.copytree(faulty, tmp_path / "t.lance"))
    size, expected = part_bytes(uri), asdict(verify(uri))
    steps = Path(uri) / "_kalm" / "steps"
    steps.parent.mkdir(exist_ok=True)
    shutil.rmtree(steps, ignore_errors=True)
    steps.write_text("a file, since root may write to any folder")
    assert asdict(verify(uri, part_bytes=size)) == expected
    assert "cannot be written" in caplog.text
    assert "--scratch" in caplog.text
    caplog.clear()
    scratch = tmp_path / "scratch"
    assert asdict(verify(uri, part_bytes=size, scratch=str(scratch))) == expected
    assert not caplog.text
    assert not [path for path in scratch.rglob("*") if path.is_file()]
    with pytest.raises(InputError, match=r"cannot write to --scratch .*steps"):
        verify(uri, part_bytes=size, scratch=str(steps))
