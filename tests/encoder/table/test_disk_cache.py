"""A disk cache changes no answer, keeps to its size, survives kills, and forgets what is erased."""

import fcntl
import gc
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import lance
import numpy as np
import pytest

from jobs.options import open_disk_cache
from kalm_encoder import DiskCache, PassageTable
from kalm_encoder.errors import CorruptRowError, InputError
from kalm_encoder.matryoshka import PackedStates, PassageStates
from kalm_encoder.table.cache import cached_table, disk_cache, read_through
from kalm_encoder.table.cache.folder import LOCK, CacheFolder
from kalm_encoder.table.cache.key_index import NOWHERE, KeyIndex
from kalm_encoder.table.cache.segments import SUFFIX
from kalm_encoder.table.location import Location
from kalm_encoder.table.reader import LIVE_TAG
from kalm_encoder.table.restricted import RestrictedTable
from kalm_encoder.table.rows import build_rows
from kalm_encoder.table.spec import TableSpec
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.upkeep import erase as erasing
from pipeline.upkeep.delete import compact, delete
from pipeline.upkeep.sync import sync
from pipeline.workers.local import in_process
from tests.conftest import make_texts, write_corpus
from tests.golden import write
from tests.support.commands import kalm
from tests.support.s3_server import serve

MB = 1 << 20
INDEX = 16 * MB
ROWS = 200
IDS = [f"d{i}" for i in range(ROWS)]


def random_table(folder: Path, rows: int = ROWS) -> str:
    """A table of random states of about 5 kB per row at ratio 4, and 2.5 kB at ratio 8."""
    spec = TableSpec("none", None, "none", 64, 1024, (4, 8), "float16", keep_text=False)
    rng = np.random.default_rng(0)
    ids = [f"d{i}" for i in range(rows)]
    drawn = rng.standard_normal((rows, 40, 64)).astype(np.float32)
    passages = PackedStates.of([PassageStates(states, 158, False) for states in drawn])
    uri = str(folder / "t.lance")
    dataset = lance.write_dataset(build_rows(spec, ids, ids, passages, "s"), uri)
    dataset.tags.create(LIVE_TAG, dataset.version)
    return uri


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return random_table(tmp_path_factory.mktemp("random"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def taken(table, ids=IDS, ratio=None):
    return [(p.states.tobytes(), p.num_tokens, p.content) for p in table.take(ids, ratio=ratio)]


def segments(folder):
    return sorted(folder.glob(f"*{SUFFIX}"))


def fill(uri, folder, ids=IDS, max_bytes=16 * MB):
    """Take rows as a process that ends afterwards; return its numbers of hits and misses."""
    cache = DiskCache(folder, max_bytes)
    table = PassageTable.open(uri, disk_cache=cache)
    assert taken(table, ids) == taken(PassageTable.open(uri), ids)
    found = cache.lookups
    del table, cache
    gc.collect()
    return found


@pytest.mark.parametrize("index_bytes", [0, INDEX])
def test_answers_are_the_same_and_ratios_are_kept_apart(uri, folder, index_bytes):
    cache = DiskCache(folder, 16 * MB)
    table = PassageTable.open(uri, disk_cache=cache, index_bytes=index_bytes)
    plain = PassageTable.open(uri)
    assert taken(table) == taken(plain)
    assert cache.lookups == (0, ROWS)
    for ratio, hits in ((4, ROWS), (12, 2 * ROWS), (8, 2 * ROWS), (16, 3 * ROWS)):
        assert taken(table, ratio=ratio) == taken(plain, ratio=ratio)
        assert cache.lookups == (hits, 2 * ROWS if ratio in (8, 16) else ROWS)
    mixed = [*IDS[50:60], "nope", *IDS[:5]]
    assert table.find(mixed).keys() == set(mixed) - {"nope"}
    assert RestrictedTable(table, "id = 'd7'").find(["d7", "d8"]).keys() == {"d7"}
    assert table.take([]) == []
    assert cache.nbytes == sum(file.stat().st_size for file in segments(folder))


@pytest.mark.parametrize("dtype", write.FILES)
def test_every_store_dtype(dtype, folder):
    uri = str(write.path_of(2, dtype))
    for _ in range(2):
        table = PassageTable.open(uri, disk_cache=DiskCache(folder, 16 * MB))
        for ratio in (2, 4, 8):
            assert taken(table, write.IDS, ratio) == taken(PassageTable.open(uri), write.IDS, ratio)


def test_200_requests_make_none_the_second_time(tmp_path, folder):
    with serve(tmp_path / "s3") as s3:
        random_table(s3.folder / "bucket", 1000)
        rng = random.Random(0)
        requests = [[f"d{i}" for i in rng.sample(range(1000), 100)] for _ in range(200)]
        how = {"storage_options": s3.options, "index_bytes": INDEX}

        def opened():
            cache = DiskCache(folder, 64 * MB)
            table = PassageTable.open("s3://bucket/t.lance", disk_cache=cache, **how)
            s3.faults()
            return table

        table = opened()
        first = [taken(table, ids) for ids in requests]
        assert s3.stats()["requests"]
        s3.faults()
        assert [taken(table, ids) for ids in requests] == first
        assert s3.stats()["requests"] == []
        del table
        gc.collect()
        again = opened()  # as another process
        assert [taken(again, ids) for ids in requests[:20]] == first[:20]
        assert s3.stats()["requests"] == []


def test_it_stays_warm_across_sync_and_compaction(model_dir, tmp_path, folder):
    corpus, uri = tmp_path / "c.jsonl", str(tmp_path / "t.lance")
    texts = make_texts(60)
    job = EncodeJob(
        inputs=(str(write_corpus(corpus, texts)),), uri=uri, model=str(model_dir), shard_size=7
    )
    run(job, in_process)
    cache, ids = DiskCache(folder, 16 * MB), [f"p{i}" for i in range(60)]
    taken(PassageTable.open(uri, disk_cache=cache), ids)
    write_corpus(corpus, [*texts[:50], *(f"{text} again" for text in texts[50:])])
    sync(job, in_process)
    delete(Location(uri), ["p0"])
    compact(Location(uri))
    later = PassageTable.open(uri, disk_cache=cache, index_bytes=INDEX)
    assert taken(later, ids[1:]) == taken(PassageTable.open(uri), ids[1:])
    assert cache.lookups == (49, 60 + 10)


@pytest.mark.parametrize("finished", [True, False])
def test_flipped_bits_are_misses(uri, folder, finished):
    """Flip single bits all over a segment, with its footer and without it."""
    fill(uri, folder)
    (file,) = segments(folder)
    content = file.read_bytes()
    content = content if finished else content[:-40]
    rng, misses = np.random.default_rng(0), 0
    # The footer is a few thousandths of the file, so it gets flips of its own.
    places = [
        *rng.integers(0, len(content), 6),
        *rng.integers(len(content) - 2000, len(content), 3),
    ]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        for other in segments(folder):
            other.unlink()
        file.write_bytes(damaged)
        misses += fill(uri, folder)[1]
        assert fill(uri, folder)[1] == 0, "what was damaged is kept anew"
    assert misses >= 6


def test_torn_segments_are_read_up_to_the_tear(uri, folder):
    fill(uri, folder)
    (file,) = segments(folder)
    content = file.read_bytes()
    for share in (0.001, 0.3, 0.99):
        for other in segments(folder):
            other.unlink()
        file.write_bytes(content[: int(share * len(content))] + bytes(5000))
        hits, misses = fill(uri, folder)
        assert hits + misses == ROWS
        assert abs(hits - share * ROWS) <= 3


def process(uri, folder, max_bytes=16 * MB, segment_bytes=2 * MB):
    command = [sys.executable, "-m", "tests.support.cache_reader", uri, str(folder)]
    return subprocess.Popen(
        [*command, str(max_bytes), str(segment_bytes)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def told(reader, line="\n"):
    reader.stdin.write(line)
    reader.stdin.flush()


def test_killed_while_it_writes(uri, folder):
    """What a killed process had written is found, and its reserved room does not hide it."""
    for _ in range(2):
        reader = process(uri, folder)
        told(reader)
        deadline = time.monotonic() + 120
        while not any(any(file.read_bytes()[:4]) for file in segments(folder)):
            assert time.monotonic() < deadline
        reader.kill()
        reader.communicate()
        assert sum(fill(uri, folder)) == ROWS
        assert fill(uri, folder) == (ROWS, 0)
        for file in segments(folder):
            file.unlink()


def test_processes_share_a_folder_and_what_one_removes_the_other_reads_again(
    uri, folder, monkeypatch
):
    monkeypatch.setattr(cached_table, "RESCAN_S", 0.0)
    cache = DiskCache(folder, 16 * MB)
    table = PassageTable.open(uri, disk_cache=cache)
    reader = process(uri, folder)
    try:
        told(reader)
        assert reader.stdout.readline() == "0\n"
        taken(table)
        assert cache.lookups == (ROWS, 0), "the other process still runs and has not finished"
        for file in segments(folder):
            file.unlink()
        told(reader)
        assert reader.stdout.readline() == "0\n"
        told(reader)
        assert reader.stdout.readline() == f"{ROWS}\n"
        taken(table)
        assert cache.lookups == (2 * ROWS, 0)
    finally:
        reader.communicate(timeout=120)


def test_the_size_is_never_exceeded_by_several_processes(uri, folder):
    """The rows take 1.1 MB in four segments of the cache, whose limit is 1 MB."""
    readers = [process(uri, folder, MB, MB // 8) for _ in range(2)]
    for reader in readers:
        told(reader, "\n" * 20)
        reader.stdin.close()
    sizes = []
    while any(reader.poll() is None for reader in readers):
        if (folder / LOCK).exists():
            with (folder / LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # files do not come and go while they are summed
                sizes.append(sum(file.stat().st_size for file in folder.iterdir()))
        time.sleep(0.01)
    assert [reader.returncode for reader in readers] == [0, 0]
    assert max(sizes) <= MB
    assert max(sizes) > MB // 2


def test_what_was_used_last_stays(uri, folder, monkeypatch):
    monkeypatch.setattr(cached_table, "TOUCH_S", 0.0)
    monkeypatch.setattr(disk_cache, "MIN_SEGMENTS", 4)
    cache = DiskCache(folder, MB)  # each segment has room for 50 rows
    table = PassageTable.open(uri, disk_cache=cache)
    for start in range(0, ROWS, 45):
        taken(table, IDS[start : start + 45])
        taken(table, IDS[:45])
    hits, _ = cache.lookups
    taken(table, IDS[:45])
    assert cache.lookups[0] == hits + 45
    assert taken(table) == taken(PassageTable.open(uri)), "rows that were dropped are read again"


def test_a_folder_that_cannot_be_used_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        DiskCache(tmp_path / "file" / "below", 16 * MB)
    with pytest.raises(InputError, match="too small"):
        DiskCache(tmp_path, 1000)


def test_a_full_disk_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_cache, "SEGMENT_BYTES", 1 << 60)
    with pytest.raises(InputError, match="MB free, and a disk cache needs"):
        DiskCache(tmp_path, 1 << 63)


def test_a_folder_that_fails_later_costs_a_warning_and_no_request(uri, folder, caplog):
    cache = DiskCache(folder, 16 * MB)
    table = PassageTable.open(uri, disk_cache=cache)
    shutil.rmtree(folder)
    folder.write_text("in the way")
    for _ in range(2):
        assert taken(table) == taken(PassageTable.open(uri))
    assert caplog.text.count("nothing is added to it for 60 s") == 1
    assert taken(PassageTable.open(uri, disk_cache=cache)) == taken(table)
    assert "if rows were erased, they may still be there" in caplog.text
    assert cache.nbytes == 0


def test_other_files_in_the_folder_leave_less_room(uri, folder, caplog):
    folder.mkdir()
    (folder / "of the user").write_bytes(bytes(MB))
    fill(uri, folder, max_bytes=MB)
    assert "other files in the folder leave no room" in caplog.text
    assert segments(folder) == []


def test_damaged_rows_are_neither_kept_nor_answered(uri, tmp_path, folder):
    copy = tmp_path / "t.lance"
    shutil.copytree(uri, copy)
    table = PassageTable.open(str(copy))
    wanted = table.take(["d5"])[0].states.tobytes()
    (file,) = (copy / "data").glob("*.lance")
    content = file.read_bytes()
    at = content.index(wanted[:64])
    file.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    damaged = PassageTable.open(str(copy), disk_cache=DiskCache(folder, 16 * MB), index_bytes=INDEX)
    for _ in range(2):
        with pytest.raises(CorruptRowError, match="row 'd5'"):
            damaged.take(["d4", "d5"])
    assert len(damaged.take(["d4"])) == 1


def test_an_entry_under_the_key_of_another_row_is_no_answer(uri, folder, monkeypatch):
    """Two checksums of 64 bits may be equal: the row's own checksum tells the rows apart."""
    keys = read_through.record_keys
    monkeypatch.setattr(read_through, "record_keys", lambda sums, ratio: keys(sums * 0, ratio))
    table = PassageTable.open(uri, disk_cache=DiskCache(folder, 16 * MB), index_bytes=INDEX)
    for ids in (IDS[:3], IDS[1:4]):
        assert taken(table, ids) == taken(PassageTable.open(uri), ids)


def test_a_cache_travels_by_its_folder(folder):
    copy = pickle.loads(pickle.dumps(DiskCache(folder, 16 * MB)))
    assert (copy.folder.path, copy.max_bytes) == (folder, 16 * MB)


def test_the_index_finds_what_was_added_last():
    rng, index, right = random.Random(0), KeyIndex(), {}
    alive = set(range(1, 40))
    for number in range(1, 40):
        keys = [rng.randrange(300) for _ in range(rng.randrange(1, 30))]
        places = [(number << 32) + i for i in range(len(keys))]
        index.add(np.array(keys, np.uint64), np.array(places, np.uint64), alive)
        right |= dict(zip(keys, places, strict=True))
        found = index.find(np.arange(300, dtype=np.uint64))
        assert found.tolist() == [right.get(key, NOWHERE) for key in range(300)]
    assert index.nbytes < 3 * 16 * len(right)
    gone = index.find(np.arange(300, dtype=np.uint64))
    index.add(np.full(1000, 7, np.uint64), np.full(1000, 50 << 32, np.uint64), {50})
    assert set(gone.tolist()) > set(index.find(np.arange(300, dtype=np.uint64)).tolist()) - {
        50 << 32
    }


ERASED = ["p3", "p17"]


def traces(folder, states):
    return {
        id
        for file in folder.iterdir()
        for id, content in states.items()
        if content in file.read_bytes()
    }


def test_erased_rows_leave_it(model_dir, tmp_path, folder, monkeypatch):
    """Also those that a reader of the older version adds while the erasure is under way."""
    corpus = write_corpus(tmp_path / "c.jsonl", make_texts(30, seed=1))
    uri = str(tmp_path / "t.lance")
    run(EncodeJob(inputs=(str(corpus),), uri=uri, model=str(model_dir)), in_process)
    ids, left = [f"p{i}" for i in range(30)], [f"p{i}" for i in range(30) if f"p{i}" not in ERASED]
    passages = zip(ERASED, PassageTable.open(uri).take(ERASED), strict=True)
    states = {id: passage.states.tobytes()[:64] for id, passage in passages}
    cache = DiskCache(folder, 16 * MB)
    before = PassageTable.open(uri, disk_cache=cache)
    opened, steps = {"before": before}, []
    taken(before, ids)
    assert traces(folder, states) == set(ERASED)
    begin = erasing.begin_erasure

    def begun(*arguments):
        erased = begin(*arguments)
        opened["begun"] = PassageTable.open(uri, disk_cache=cache)
        assert traces(folder, states) == set()
        taken(before, ids)
        assert traces(folder, states) == set(), "a version that has not seen it adds nothing"
        taken(opened["begun"], ids)
        assert traces(folder, states) == set(ERASED), "the rows are still there"
        steps.append("begun")
        return erased

    def switched(_):
        other = PassageTable.open(uri, disk_cache=DiskCache(folder, 16 * MB))  # another process
        opened["switched"] = PassageTable.open(uri, disk_cache=cache)
        assert traces(folder, states) == set()
        for name in ("before", "begun"):
            taken(opened[name], ids)
        assert traces(folder, states) == set()
        taken(opened["switched"], left)
        taken(other, left)
        steps.append("switched")

    monkeypatch.setattr(erasing, "begin_erasure", begun)
    monkeypatch.setattr(erasing.time, "sleep", switched)
    erasing.erase(Location(uri), ERASED)
    assert steps == ["begun", "switched"]
    after = PassageTable.open(uri, disk_cache=cache)
    assert taken(after, left) == taken(PassageTable.open(uri), left)
    assert traces(folder, states) == set()
    hits, misses = cache.lookups
    taken(PassageTable.open(uri, disk_cache=cache), left)
    assert cache.lookups == (hits + len(left), misses), "it is kept from then on"


def test_commands_fill_use_and_empty_it(small_table, tmp_path, folder):
    copy, ids = tmp_path / "t.lance", tmp_path / "ids.txt"
    shutil.copytree(small_table, copy)
    ids.write_text("\n".join([*(f"p{i}" for i in range(60)), "nope"]))
    given = ("--disk-cache", folder, "--disk-cache-gb", "0.1")
    done = kalm("warm", copy, "--ids-file", ids, *given, check=0)
    assert "60 passages are stored, of which 0 were in" in done.stdout
    assert "1 ids are not in the table" in done.stdout
    for file in segments(folder):
        os.utime(file, (0, 0))
    kalm("rerank", copy, "--query", "token", "--ids", "p1,p2", *given, check=0)
    assert all(file.stat().st_mtime for file in segments(folder)), "it was used"
    ids.write_text("p3")
    erase = ("erase", copy, "--ids-file", ids, "--wait", 0, "--disk-cache", folder)
    assert "segments of the disk cache" in kalm(*erase, check=0).stdout
    assert segments(folder) == []


def test_options_that_make_no_cache_are_refused(tmp_path):
    with pytest.raises(InputError, match="needs both --disk-cache DIR and --disk-cache-gb N"):
        open_disk_cache(tmp_path, None)
    assert open_disk_cache(None, None) is None
    with pytest.raises(InputError, match="is not the folder of a disk cache"):
        CacheFolder.existing(tmp_path)
