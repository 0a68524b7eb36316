"""The table itself, with a tiny model: many small shards, sync, and what a checksum costs."""

from __future__ import annotations

import json
import random
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path

import lance
import numpy as np

from jobs.demo import standard_library_docs
from kalm_encoder import PassageEncoder, PassageTable
from kalm_encoder.model.checkpoint import resolve
from kalm_encoder.table.checksums import states_checksum
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.upkeep.sync import sync
from pipeline.workers.local import encode_inline
from tests.bench.data import FOLDER, bar, nano_checkpoint, spread
from tests.support.random_model import make_checkpoint

PASSAGES, SHARDS, TAKES = 20_000, 2_000, 40
WORDS = [
    "index",
    "query",
    "passage",
    "encoder",
    "decoder",
    "state",
    "ratio",
    "shard",
    "commit",
    "table",
    "version",
]


def main() -> list[str]:
    model = _tiny()
    texts = _texts()
    corpus = _write(FOLDER / "store.jsonl", texts)
    job = EncodeJob(
        inputs=(str(corpus),), uri=str(FOLDER / "shards.lance"), model=str(model),
        shard_size=PASSAGES // SHARDS,
    )  # fmt: skip
    shutil.rmtree(job.uri, ignore_errors=True)
    _many_shards(job)
    whole = EncodeJob(
        inputs=job.inputs, uri=str(FOLDER / "whole.lance"), model=str(model), shard_size=PASSAGES
    )
    shutil.rmtree(whole.uri, ignore_errors=True)
    run(whole, encode_inline)
    bars = [bar("take_many_shards", _take_ratio(job.uri, whole.uri), "<=", 1.3)]
    bars.append(bar("sync_encoded_share", _sync(job, texts), "<=", 0.01))
    return [*bars, bar("checksum_share", _checksum_share(), "<=", 0.1)]


def _tiny() -> Path:
    model = FOLDER / "tiny"
    if not (model / "model.safetensors").exists():
        make_checkpoint(model, (d["text"] for d in standard_library_docs()))
    return model


def tiny_table() -> str:
    """A table of 200 passages p0, p1, … by the tiny model; float32, so that scores compare."""
    corpus = _write(FOLDER / "tiny.jsonl", _texts()[:200])
    uri = str(FOLDER / "tiny-200.lance")
    run(
        EncodeJob(inputs=(str(corpus),), uri=uri, model=str(_tiny()), store_dtype="float32"),
        encode_inline,
    )
    return uri


def _texts() -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 30))) for _ in range(PASSAGES)]


def _write(path: Path, texts: list[str]) -> Path:
    lines = (json.dumps({"_id": f"p{i}", "text": t}) + "\n" for i, t in enumerate(texts))
    path.write_text("".join(lines))
    return path


def _files(uri: str) -> int:
    return sum(p.is_file() for p in Path(uri).rglob("*"))


def _many_shards(job: EncodeJob) -> None:
    """Report versions, files and memory of a job of many shards, before and after the seal."""
    before = {}

    def watched(config, shards):
        yield from encode_inline(config, shards)
        before.update(
            versions=len(lance.dataset(job.uri).versions()), files=_files(job.uri),
            rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        )  # fmt: skip

    began = time.perf_counter()
    run(job, watched)
    dataset = lance.dataset(job.uri)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(
        f"{SHARDS} shards of {PASSAGES // SHARDS} rows in {time.perf_counter() - began:.0f} s; "
        f"before the last commit {before['versions']} versions, {before['files']} files, "
        f"peak memory {before['rss']} MiB (model and encoder included); complete: "
        f"{len(dataset.versions())} versions, {_files(job.uri)} files, "
        f"{len(dataset.get_fragments())} fragments, {peak} MiB"
    )


def _take_ratio(many: str, whole: str) -> float:
    """Time of opening a table and taking 100 rows: from many shards over from one piece."""
    times: dict[str, list[float]] = {many: [], whole: []}
    rng = random.Random(1)
    for _ in range(TAKES):
        ids = [f"p{i}" for i in rng.sample(range(PASSAGES), 100)]
        for uri, spent in times.items():
            began = time.perf_counter()
            PassageTable.open(uri).take(ids)
            spent.append(1000 * (time.perf_counter() - began))
    for uri, spent in times.items():
        print(f"open and take 100 rows of {Path(uri).stem}: {spread(spent)} ms")
    return statistics.median(times[many]) / statistics.median(times[whole])


def _sync(job: EncodeJob, texts: list[str]) -> float:
    """Change 1 % of the corpus; count what reaches the encoder; compare with a fresh encode."""
    changed = random.Random(2).sample(range(PASSAGES), PASSAGES // 100)
    for i in changed:
        texts[i] = f"changed {texts[i]}"
    _write(Path(job.inputs[0]), texts)
    encoded = []
    real = PassageEncoder.start

    def counting(self, tokens, *, ratio):
        encoded.append(len(tokens))
        return real(self, tokens, ratio=ratio)

    PassageEncoder.start = counting
    began = time.perf_counter()
    changes, _ = sync(job, encode_inline)
    PassageEncoder.start = real
    print(
        f"sync of {PASSAGES} passages: {changes.unchanged} unchanged, {changes.changed} changed, "
        f"{changes.new} new; {sum(encoded)} encoded in {time.perf_counter() - began:.1f} s"
    )
    fresh = EncodeJob(
        inputs=job.inputs, uri=str(FOLDER / "fresh.lance"), model=job.model, shard_size=1000
    )
    shutil.rmtree(fresh.uri, ignore_errors=True)
    run(fresh, encode_inline)
    print(f"rows that differ from a fresh encode: {_differences(job.uri, fresh.uri)}")
    return sum(encoded) / PASSAGES


def _differences(uri: str, other: str) -> int:
    """Count rows that are not in both, or whose states differ by more than float16 rounding."""
    columns = ["id", "text", "text_hash", "num_tokens", "truncated"]
    tables = [lance.dataset(u, version="live").to_table(columns=columns) for u in (uri, other)]
    one, two = ({r["id"]: r for r in t.to_pylist()} for t in tables)
    ids = sorted(one.keys() & two.keys())
    different = len(one.keys() ^ two.keys()) + sum(one[i] != two[i] for i in ids)
    for start in range(0, len(ids), 2000):
        some = ids[start : start + 2000]
        taken = (PassageTable.open(u).take(some) for u in (uri, other))
        for a, b in zip(*taken, strict=True):
            same = a.states.shape == b.states.shape and np.allclose(
                a.states.astype(np.float32), b.states.astype(np.float32), rtol=2**-10, atol=2**-14
            )
            different += not same
    return different


def _checksum_share() -> float:
    """Share of the time of a take that goes into checksums, at Nano's width."""
    resolve(str(nano_checkpoint()))
    table = FOLDER / "rerank128.lance"
    if not table.exists():
        sys.exit("run tests.bench.rerank first: it makes the table this measures")
    ids = [str(i) for i in range(100)]
    opened = PassageTable.open(str(table))
    takes, sums = [], []
    for _ in range(20):
        began = time.perf_counter()
        passages = opened.take(ids)
        takes.append(time.perf_counter() - began)
        began = time.perf_counter()
        for i, passage in zip(ids, passages, strict=True):
            states_checksum(i, passage.num_tokens, passage.truncated, passage.states)
        sums.append(time.perf_counter() - began)
    print(f"take 100 x 128 tokens {spread([1000 * t for t in takes])} ms, of which checksums "
          f"{spread([1000 * s for s in sums])} ms")  # fmt: skip
    return statistics.median(sums) / statistics.median(takes)


if __name__ == "__main__":
    print("\n".join(main()))
