"""Takes from 10,000 and 1,000,000 rows, requests on S3, and what a cascade reads."""

from __future__ import annotations

import random
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa

from jobs.bench.data import FOLDER, bar, ms_marco_lengths, nano_checkpoint, passages_of, spread
from jobs.bench.rerank import QUERY
from kalm_encoder import PassageStates, PassageTable, QueryDecoder, Reranker
from kalm_encoder.checkpoint import resolve
from kalm_encoder.rows import TableSpec, build_rows
from kalm_encoder.table import LIVE_TAG
from pipeline.driver import encode_inline, run
from pipeline.job import EncodeJob
from tests.s3_server import S3, serve

SMALL, LARGE, TAKES, IDS = 10_000, 1_000_000, 40, 100
SPEC = TableSpec("none", None, "none", 64, 1024, (4,), keep_text=False)


def main() -> list[str]:
    for rows in (SMALL, LARGE):
        _table(rows)
    took: dict[int, list[float]] = {SMALL: [], LARGE: []}
    tables = {rows: PassageTable.open(str(FOLDER / f"take{rows}.lance")) for rows in took}
    rng = random.Random(0)
    for i in range(TAKES + 5):
        for rows, table in tables.items():
            ids = _some(rng, rows)
            began = time.perf_counter()
            table.take(ids)
            if i >= 5:  # warm
                took[rows].append(1000 * (time.perf_counter() - began))
    for rows in took:
        print(f"{IDS} random ids of {rows:,} rows: {spread(took[rows])} ms")
    root = FOLDER / "s3"
    shutil.rmtree(root, ignore_errors=True)
    (root / "bucket").mkdir(parents=True)
    with serve(root) as s3:
        for rows in (SMALL, LARGE):
            shutil.copytree(FOLDER / f"take{rows}.lance", root / "bucket" / "take.lance")
            uri = "s3://bucket/take.lance"
            table = PassageTable.open(uri, storage_options=s3.options)
            for _ in range(3):
                requests, size, ms = _on_s3(s3, lambda t=table, n=rows: t.take(_some(rng, n)))
            print(f"S3, {rows:,} rows, warm: {requests} requests, {size / 1e6:.2f} MB, {ms:.0f} ms")
            shutil.rmtree(root / "bucket" / "take.lance")
        _cascade(s3, root)
    shutil.rmtree(root)
    ratio = statistics.median(took[LARGE]) / statistics.median(took[SMALL])
    return [bar("take_million_rows", ratio, "<=", 1.5)]


def _some(rng: random.Random, rows: int) -> list[str]:
    return [f"doc-{i}" for i in rng.sample(range(rows), IDS)]


def _table(rows: int) -> None:
    """Passages of 8 random states each; written once."""
    uri = str(FOLDER / f"take{rows}.lance")
    if Path(uri).exists():
        return
    rng = np.random.default_rng(0)

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, rows, SMALL):
            states = rng.standard_normal((SMALL, 8, SPEC.dim)).astype(np.float32)
            ids = [f"doc-{start + i}" for i in range(SMALL)]
            passages = [PassageStates(s, 30, False) for s in states]
            yield from build_rows(SPEC, ids, ids, passages, f"shard-{start}").to_batches()

    dataset = lance.write_dataset(
        pa.RecordBatchReader.from_batches(SPEC.schema(), batches()),
        uri,
        data_storage_version="2.2",
        enable_stable_row_ids=True,
    )
    dataset.create_scalar_index("id", "BTREE")
    dataset = lance.dataset(uri)
    dataset.tags.create(LIVE_TAG, dataset.version)


def _on_s3(s3: S3, work) -> tuple[int, int, float]:
    s3.faults()
    began = time.perf_counter()
    work()
    took = 1000 * (time.perf_counter() - began)
    stats = s3.stats()
    return len(stats["requests"]), stats["bytes_sent"], took


def _cascade(s3: S3, root: Path) -> None:
    """r = 4 alone against 32:20,4 on short and long passages, from disk and from S3."""
    model = str(nano_checkpoint())
    tokenizer = resolve(model).tokenizer()
    decoder = QueryDecoder.load(model)
    ids = [str(i) for i in range(IDS)]
    for name, lengths in (("80", ms_marco_lengths(IDS)), ("512", [512] * IDS)):
        corpus = FOLDER / f"cascade{name}.tsv"
        texts = passages_of(tokenizer, lengths)
        corpus.write_text("".join(f"{i}\t{' '.join(t.split())}\n" for i, t in enumerate(texts)))
        table = FOLDER / f"cascade{name}.lance"
        if not table.exists():
            job = EncodeJob(inputs=(str(corpus),), uri=str(table), model=model, ratios=(4, 32))
            run(job, encode_inline)
        shutil.copytree(table, root / "bucket" / table.name)
        remote = PassageTable.open(f"s3://bucket/{table.name}", storage_options=s3.options)
        for where, opened in (("disk", PassageTable.open(str(table))), ("S3", remote)):
            reranker = Reranker(opened, decoder)
            for what, stages in (("r = 4", [(4, None)]), ("32:20,4", [(32, 20), (4, None)])):
                opened.take(ids, ratio=4)
                opened.take(ids, ratio=32)
                requests, size, ms = _on_s3(
                    s3, lambda r=reranker, c=stages: r.rerank(QUERY, ids, cascade=c)
                )
                read = f", {requests} requests, {size / 1e6:.2f} MB" if where == "S3" else ""
                print(f"{name} tokens, {where}, {what}: {ms / 1000:.2f} s{read}")


if __name__ == "__main__":
    print("\n".join(main()))
