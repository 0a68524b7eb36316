"""Reranking 100 stored passages against mteb's reference, which encodes them at query time."""

from __future__ import annotations

import json
import shutil
import statistics
import time

from kalm_encoder import Reranker
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.workers.local import encode_inline
from tests.bench.data import FOLDER, bar, nano_checkpoint, passages_of, spread

QUERY = "how do I read a compressed file line by line without loading all of it"
CANDIDATES = 100


def stored(model: str, name: str, texts: list[str]) -> Reranker:
    """Encode passages into a fresh table and open it."""
    corpus, table = FOLDER / f"{name}.jsonl", FOLDER / f"{name}.lance"
    shutil.rmtree(table, ignore_errors=True)
    corpus.write_text(
        "".join(json.dumps({"_id": str(i), "text": t}) + "\n" for i, t in enumerate(texts))
    )
    run(EncodeJob(inputs=(str(corpus),), uri=str(table), model=model), encode_inline)
    return Reranker.open(str(table))


def main() -> list[str]:
    from mteb.models.model_implementations.kalm_reranker import KaLMRerankerWrapper

    model = str(nano_checkpoint())
    reference = KaLMRerankerWrapper(model, device="cpu")
    ids = [str(i) for i in range(CANDIDATES)]
    bars, shares = [], []
    for length, runs, goal in ((128, 3, 4.5), (1024, 2, 16.0)):
        texts = passages_of(reference.tokenizer, [length] * CANDIDATES)
        reranker = stored(model, f"rerank{length}", texts)
        reranker.rerank(QUERY, ids[:8])
        ours, takes, theirs, ratios = [], [], [], []
        for _ in range(runs):
            began = time.perf_counter()
            results = {r.id: r.score for r in reranker.rerank(QUERY, ids)}
            ours.append(time.perf_counter() - began)
            began = time.perf_counter()
            reranker.table.take(ids)
            takes.append(time.perf_counter() - began)
            began = time.perf_counter()
            expected = []
            for start in range(0, CANDIDATES, 32):
                pairs = [(QUERY, t) for t in texts[start : start + 32]]
                expected += reference._predict_batch(pairs, [reference.instruction] * len(pairs))
            theirs.append(time.perf_counter() - began)
            ratios.append(theirs[-1] / ours[-1])
            shares.append(takes[-1] / ours[-1])
        worst = max(abs(results[i] - e) for i, e in zip(ids, expected, strict=True))
        print(f"{length} tokens: ours {spread(ours)} s, reference {spread(theirs)} s")
        print(f"  speed-up {spread(ratios)}, take {spread(takes)} s, |dP| {worst:.1e} (float16)")
        bars.append(bar(f"rerank_{length}_speedup", statistics.median(ratios), ">=", goal))
    print(f"take as a share of rerank: {spread(shares)}")
    return [*bars, bar("take_share", statistics.median(shares), "<=", 0.08)]


if __name__ == "__main__":
    print("\n".join(main()))
