"""The table: many small shards and sync with a tiny model, and what each dtype costs on disk."""

from __future__ import annotations

import random
import resource
import shutil
import statistics
import time
from pathlib import Path

import lance
import numpy as np

from kalm_encoder import PassageEncoder, PassageTable, Reranker
from kalm_encoder.model.checkpoint import resolve
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.upkeep.sync import sync
from pipeline.upkeep.truncate import truncate
from pipeline.workers.local import in_process
from tests.bench.data import (
    FOLDER,
    QUERY,
    bar,
    encode,
    job_of,
    nano_checkpoint,
    passages_of,
    spread,
    timed,
    tiny_checkpoint,
    write_corpus,
)
from tests.bench.forwards import ms_marco_lengths

PASSAGES, SHARDS, TAKES = 20_000, 2_000, 40
STORED, SCORED = 1_000, 60
WORDS = "index query passage encoder decoder state ratio shard commit table version".split()
BYTES_GOALS = {"int8": 0.52, "int4": 0.29}
"""Largest share of the bytes of a float16 table."""


def main() -> list[str]:
    texts = random_texts(PASSAGES)
    job = job_of("shards", texts, tiny_checkpoint(), shard_size=PASSAGES // SHARDS)
    _encode_many_shards(job)
    whole = encode("whole", texts, tiny_checkpoint(), shard_size=PASSAGES)
    return [
        bar("take_many_shards", _take_ratio(job.uri, whole), "<=", 1.3),
        bar("sync_encoded_share", _encoded_by_sync(job, texts), "<=", 0.01),
        *_bytes_per_dtype(),
    ]


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 30))) for _ in range(count)]


def _encode_many_shards(job: EncodeJob) -> None:
    """Print the versions, files and memory of a job of many shards."""
    seconds = timed(lambda: run(job, in_process))
    dataset = lance.dataset(job.uri)
    files = sum(path.is_file() for path in Path(job.uri).rglob("*"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(
        f"{SHARDS} shards of {PASSAGES // SHARDS} rows in {seconds:.0f} s: "
        f"{len(dataset.versions())} versions, {files} files, {len(dataset.get_fragments())} "
        f"fragments, peak memory {peak} MiB (model and encoder included)"
    )


def _take_ratio(many: str, whole: str) -> float:
    """Return the time to open a table and take 100 rows: of many shards, over of one shard."""
    times: dict[str, list[float]] = {many: [], whole: []}
    rng = random.Random(1)
    for _ in range(TAKES):
        ids = [str(i) for i in rng.sample(range(PASSAGES), 100)]
        for uri, spent in times.items():
            spent.append(1000 * timed(lambda uri=uri, ids=ids: PassageTable.open(uri).take(ids)))
    for uri, spent in times.items():
        print(f"open and take 100 rows of {Path(uri).stem}: {spread(spent)} ms")
    return statistics.median(times[many]) / statistics.median(times[whole])


def _encoded_by_sync(job: EncodeJob, texts: list[str]) -> float:
    """Change 1 % of the corpus; return the share of passages that reach the encoder.

    The result is compared with a fresh encode.
    """
    for i in random.Random(2).sample(range(PASSAGES), PASSAGES // 100):
        texts[i] = f"changed {texts[i]}"
    write_corpus(Path(job.inputs[0]), texts)
    encoded = []
    start = PassageEncoder.start

    def counting(self, tokens, *, ratio):
        encoded.append(len(tokens))
        return start(self, tokens, ratio=ratio)

    PassageEncoder.start = counting
    began = time.perf_counter()
    changes, _ = sync(job, in_process)
    PassageEncoder.start = start
    print(
        f"sync of {PASSAGES} passages: {changes.unchanged} unchanged, {changes.changed} changed, "
        f"{changes.new} new; {sum(encoded)} encoded in {time.perf_counter() - began:.1f} s"
    )
    fresh = encode("fresh", texts, job.model)
    print(f"rows that differ from a fresh encode: {_differences(job.uri, fresh)}")
    return sum(encoded) / PASSAGES


def _differences(uri: str, other: str) -> int:
    """Count rows that are not in both, or whose states differ by more than float16 rounding."""
    columns = ["id", "text", "text_hash", "num_tokens", "truncated"]
    tables = [lance.dataset(u, version="live").to_table(columns=columns) for u in (uri, other)]
    one, two = ({r["id"]: r for r in t.to_pylist()} for t in tables)
    ids = sorted(one.keys() & two.keys())
    different = len(one.keys() ^ two.keys()) + sum(one[i] != two[i] for i in ids)
    for start in range(0, len(ids), 2000):
        taken = (PassageTable.open(u).take(ids[start : start + 2000]) for u in (uri, other))
        for a, b in zip(*taken, strict=True):
            same = a.states.shape == b.states.shape and np.allclose(
                a.states.astype(np.float32), b.states.astype(np.float32), rtol=2**-10, atol=2**-14
            )
            different += not same
    return different


def _bytes_per_dtype() -> list[str]:
    """Compare the bytes and P(yes) of each dtype at ratio 4 and Nano's width with float32's."""
    model = nano_checkpoint()
    texts = passages_of(resolve(model).tokenizer(), ms_marco_lengths(STORED))
    exact = encode("float32", texts, model, store_dtype="float32")
    want = _scores(exact)
    sizes = {}
    for dtype in ("float16", *BYTES_GOALS):
        table = FOLDER / f"{dtype}.lance"
        shutil.rmtree(table, ignore_errors=True)
        truncate(exact, str(table), ratios=(4,), store_dtype=dtype)
        sizes[dtype] = sum(file.stat().st_size for file in (table / "data").glob("*.lance"))
        change = np.abs(_scores(str(table)) - want)
        print(f"{dtype}: {sizes[dtype]:,} bytes, |dP| {change.max():.2g}, mean {change.mean():.2g}")
    return [
        bar(f"{dtype}_bytes", sizes[dtype] / sizes["float16"], "<=", goal)
        for dtype, goal in BYTES_GOALS.items()
    ]


def _scores(uri: str) -> np.ndarray:
    ids = [str(i) for i in range(SCORED)]
    found = {r.id: r.score for r in Reranker.open(uri).rerank(QUERY, ids)}
    return np.array([found[i] for i in ids])
