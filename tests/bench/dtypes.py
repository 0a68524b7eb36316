"""What each store dtype and ratio costs on disk and changes in P(yes); Nano dimensions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from kalm_encoder import Reranker
from kalm_encoder.model.checkpoint import resolve
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.upkeep.truncate import truncate
from pipeline.workers.local import encode_inline
from tests.bench.data import FOLDER, bar, ms_marco_lengths, nano_checkpoint, passages_of

PASSAGES, SCORED = 1000, 60
QUERY = "how do I read a compressed file line by line without loading all of it"


def main() -> list[str]:
    model = str(nano_checkpoint())
    texts = passages_of(resolve(model).tokenizer(), ms_marco_lengths(PASSAGES))
    corpus = FOLDER / "dtypes.jsonl"
    lines = (json.dumps({"_id": str(i), "text": t}) + "\n" for i, t in enumerate(texts))
    corpus.write_text("".join(lines))
    exact = FOLDER / "float32-r4.lance"
    shutil.rmtree(exact, ignore_errors=True)
    job = EncodeJob(inputs=(str(corpus),), uri=str(exact), model=model, store_dtype="float32")
    run(job, encode_inline)
    want = _scores(Reranker.open(str(exact)))
    sizes = {}
    print("dtype    ratio  bytes/token  floor  largest dP  mean dP  rank correlation")
    for dtype in ("float16", "int8", "int4"):
        for ratio in (4, 16, 32):
            table = FOLDER / f"{dtype}-r{ratio}.lance"
            shutil.rmtree(table, ignore_errors=True)
            truncate(str(exact), str(table), ratios=(ratio,), store_dtype=dtype)
            reranker = Reranker.open(str(table))
            got = _scores(reranker)
            column = reranker.table.dataset.to_table(columns=["num_tokens"])["num_tokens"]
            tokens, floor = sum(column.to_pylist()), reranker.table.spec.bytes_per_token
            sizes[dtype, ratio] = _bytes(table)
            change = np.abs(got - want)
            ranks = np.corrcoef(got.argsort().argsort(), want.argsort().argsort())[0, 1]
            print(
                f"{dtype:<8} {ratio:>5}  {sizes[dtype, ratio] / tokens:>11.1f}  {floor:>5.1f}"
                f"  {change.max():>10.2g}  {change.mean():>7.2g}  {ranks:.4f}"
            )
    share = {d: sizes[d, 4] / sizes["float16", 4] for d in ("int8", "int4")}
    goals = {"int8": 0.52, "int4": 0.29}
    return [bar(f"{dtype}_bytes", share[dtype], "<=", goal) for dtype, goal in goals.items()]


def _scores(reranker: Reranker) -> np.ndarray:
    ids = [str(i) for i in range(SCORED)]
    found = {r.id: r.score for r in reranker.rerank(QUERY, ids)}
    return np.array([found[i] for i in ids])


def _bytes(table: Path) -> int:
    """Data files of the table, all columns; indexes and manifests left out."""
    return sum(file.stat().st_size for file in (table / "data").glob("*.lance"))


if __name__ == "__main__":
    print("\n".join(main()))
