"""Takes from 10,000 and 1,000,000 rows, with and without the index in memory; requests on S3.

The service holds the index in memory, so the bar is measured with it.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import lance
import numpy as np
import psutil
import pyarrow as pa

from kalm_encoder import PassageStates, PassageTable, QueryDecoder, Reranker
from kalm_encoder.model.checkpoint import resolve
from kalm_encoder.table.reader import LIVE_TAG
from kalm_encoder.table.rows import build_rows
from kalm_encoder.table.spec import TableSpec
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.workers.local import encode_inline
from tests.bench.data import FOLDER, bar, ms_marco_lengths, nano_checkpoint, passages_of, spread
from tests.bench.rerank import QUERY
from tests.support.s3_server import S3, serve

SMALL, LARGE, TAKES, IDS = 10_000, 1_000_000, 300, 100
LIMIT = 1 << 30
HOW = {True: "index in memory", False: "index on disk"}


def main(dim: int = 64, states: int = 8) -> list[str]:
    spec = TableSpec("none", None, "none", dim, 1024, (4,), keep_text=False)
    uris = {rows: _table(rows, spec, states) for rows in (SMALL, LARGE)}
    tables = {(rows, indexed): _open(uri, indexed) for indexed in HOW for rows, uri in uris.items()}
    took: dict[tuple[int, bool], list[float]] = {key: [] for key in tables}
    rng = random.Random(0)
    for i in range(TAKES + 5):
        # In another order each time: a take is slower behind one that read much.
        for key in rng.sample(list(tables), len(tables)):
            ids = _some(rng, key[0])
            began = time.perf_counter()
            tables[key].take(ids)
            if i >= 5:  # warm
                took[key].append(1000 * (time.perf_counter() - began))
    for (rows, indexed), times in took.items():
        print(f"{IDS} random ids of {rows:,} rows, {HOW[indexed]}: {spread(times)} ms")
    ratio = {i: statistics.median(took[LARGE, i]) / statistics.median(took[SMALL, i]) for i in HOW}
    print(f"a million rows against {SMALL:,}, {HOW[False]}: {ratio[False]:.2f}")
    root = FOLDER / "s3"
    shutil.rmtree(root, ignore_errors=True)
    (root / "bucket").mkdir(parents=True)
    with serve(root) as s3:
        for rows, uri in uris.items():
            _takes_from_s3(s3, root, uri, rows)
        _cascade(s3, root)
    shutil.rmtree(root)
    return [bar("take_million_rows", ratio[True], "<=", 1.5)]


def _open(uri: str, indexed: bool) -> PassageTable:
    """Open a table; what an index costs is printed."""
    table, process = PassageTable.open(uri), psutil.Process()
    if indexed:
        before, began = process.memory_info().rss, time.perf_counter()
        table.load_index(LIMIT)
        seconds, grown = time.perf_counter() - began, process.memory_info().rss - before
        size = table.index.nbytes if table.index else 0
        print(
            f"{len(table):,} rows indexed in {seconds:.2f} s: {size / 1e6:.1f} MB, the process "
            f"grew by {grown / 1e6:.0f} MB"
        )
    return table


def _takes_from_s3(s3: S3, root: Path, uri: str, rows: int) -> None:
    place, rng = root / "bucket" / "take.lance", random.Random(1)
    shutil.copytree(uri, place)
    for indexed in HOW:
        table = PassageTable.open("s3://bucket/take.lance", storage_options=s3.options)
        built = ""
        if indexed:
            requests, size, ms = _on_s3(s3, lambda t=table: t.load_index(LIMIT))
            built = f"; built in {ms:.0f} ms with {requests} requests, {size / 1e6:.2f} MB"
        taken = [_on_s3(s3, lambda t=table: t.take(_some(rng, rows))) for _ in range(12)]
        requests, size, ms = (statistics.median(values) for values in zip(*taken[2:], strict=True))
        print(
            f"S3, {rows:,} rows, {HOW[indexed]}, warm: {requests:.0f} requests, "
            f"{size / 1e6:.2f} MB, {ms:.0f} ms{built}"
        )
    shutil.rmtree(place)


def _some(rng: random.Random, rows: int) -> list[str]:
    return [f"doc-{i}" for i in rng.sample(range(rows), IDS)]


def _table(rows: int, spec: TableSpec, num_states: int) -> str:
    """Passages of some random states each; written once. Returns the address."""
    uri = str(FOLDER / f"take{rows}x{num_states}x{spec.dim}.lance")
    if Path(uri).exists():
        return uri
    rng = np.random.default_rng(0)

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, rows, SMALL):
            states = rng.standard_normal((SMALL, num_states, spec.dim)).astype(np.float32)
            ids = [f"doc-{start + i}" for i in range(SMALL)]
            passages = [PassageStates(s, 4 * num_states - 2, False) for s in states]
            yield from build_rows(spec, ids, ids, passages, f"shard-{start}").to_batches()

    dataset = lance.write_dataset(
        pa.RecordBatchReader.from_batches(spec.schema(), batches()),
        uri,
        data_storage_version="2.2",
        enable_stable_row_ids=True,
    )
    dataset.create_scalar_index("id", "BTREE")
    dataset = lance.dataset(uri)
    dataset.tags.create(LIVE_TAG, dataset.version)
    return uri


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
    parser = argparse.ArgumentParser()
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--states", type=int, default=8)
    print("\n".join(main(**vars(parser.parse_args()))))
