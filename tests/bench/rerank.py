"""Reranking stored passages: against mteb's reference, with hot passages, and of bare products.

The reference encodes the passages at query time, from text.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from kalm_encoder import Reranker
from kalm_encoder.model.batching import make_batches
from kalm_encoder.model.checkpoint import resolve
from kalm_encoder.model.decoder import MAX_PADDING
from tests.bench.data import QUERY, bar, encode, nano_checkpoint, passages_of, spread, timed

CANDIDATES, HOT_RUNS = 100, 3
PRODUCT_CANDIDATES, PRODUCT_RUNS = 31, 11


def main() -> list[str]:
    against_reference = _against_reference({128: (3, 4.5), 1024: (2, 16.0)}, CANDIDATES)
    return [*against_reference, *_against_products_and_hot()]


def short() -> list[str]:
    return _against_reference({128: (2, 4.5)}, PRODUCT_CANDIDATES)


def _against_reference(lengths: dict[int, tuple[int, float]], candidates: int) -> list[str]:
    """Compare speed with mteb's wrapper; by length of the passages the rounds and the goal."""
    from mteb.models.model_implementations.kalm_reranker import KaLMRerankerWrapper

    model = nano_checkpoint()
    reference = KaLMRerankerWrapper(model, device="cpu")
    ids = [str(i) for i in range(candidates)]
    bars, shares = [], []
    for length, (rounds, goal) in lengths.items():
        texts = passages_of(reference.tokenizer, [length] * candidates)
        reranker = Reranker.open(encode(f"rerank{length}", texts, model))
        reranker.rerank(QUERY, ids[:8])
        ours, theirs, takes = [], [], []
        for _ in range(rounds):
            began = time.perf_counter()
            results = {r.id: r.score for r in reranker.rerank(QUERY, ids)}
            ours.append(time.perf_counter() - began)
            takes.append(timed(lambda table=reranker.table: table.take(ids)))
            began = time.perf_counter()
            expected = []
            for start in range(0, candidates, 32):
                pairs = [(QUERY, t) for t in texts[start : start + 32]]
                expected += reference._predict_batch(pairs, [reference.instruction] * len(pairs))
            theirs.append(time.perf_counter() - began)
        ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
        shares += [take / our for our, take in zip(ours, takes, strict=True)]
        worst = max(abs(results[i] - e) for i, e in zip(ids, expected, strict=True))
        print(f"{length} tokens: ours {spread(ours)} s, reference {spread(theirs)} s")
        print(f"  speed-up {spread(ratios)}, take {spread(takes)} s, |dP| {worst:.1e} (float16)")
        bars.append(bar(f"rerank_{length}_speedup", statistics.median(ratios), ">=", goal))
    print(f"take as a share of rerank: {spread(shares)}")
    return [*bars, bar("take_share", statistics.median(shares), "<=", 0.08)]


def _against_products_and_hot() -> list[str]:
    """Compare a rerank with its own matrix products, and with one whose passages are hot."""
    model = nano_checkpoint()
    texts = passages_of(resolve(model).tokenizer(), [128] * CANDIDATES)
    plain = Reranker.open(encode("products", texts, model))
    ids = [str(i) for i in range(CANDIDATES)]
    hot = Reranker.open(plain.table.uri, hot_bytes=2 << 30)
    hot.rerank(QUERY, ids)
    some = ids[:PRODUCT_CANDIDATES]
    multiply = _products(plain, some)
    shares, gains = [], []
    for _ in range(PRODUCT_RUNS):
        whole = timed(lambda: plain.rerank(QUERY, some))
        shares.append(timed(multiply) / whole)
    for _ in range(HOT_RUNS):
        cold = timed(lambda: plain.rerank(QUERY, ids))
        gains.append(cold / timed(lambda: hot.rerank("another question about " + QUERY[9:], ids)))
    print(f"matrix products / rerank {spread(shares)}; hot speed-up {spread(gains)}")
    print(f"hot passages take {hot.decoder.hot.nbytes / CANDIDATES / 2**20:.1f} MiB each")
    return [
        bar("decode_of_bare_products", statistics.median(shares), ">=", 0.85),
        bar("hot_speedup", statistics.median(gains), ">=", 3),
    ]


def _products(reranker: Reranker, ids: list[str]) -> Callable[[], None]:
    """Return what does one rerank's matrix products, attention included, and nothing else."""
    decoder, config = reranker.decoder, reranker.decoder.model.config
    p = len(decoder.prompt(QUERY).ids)
    sizes = [len(passage.states) for passage in reranker.table.take(ids)]
    kv, width = config.num_key_value_heads, config.head_dim
    groups = config.num_attention_heads // kv
    layers = decoder.model.layers
    made: dict[tuple[int, ...], torch.Tensor] = {}

    def random(*shape: int) -> torch.Tensor:
        return made.setdefault(shape, torch.randn(shape))

    products = []
    for batch in make_batches(sizes, decoder.token_budget, overhead=p, max_padding=MAX_PADDING):
        b, m = len(batch), max(sizes[i] for i in batch)
        for i, layer in enumerate(layers):
            attention, mlp, last = layer.self_attn, layer.mlp, i == len(layers) - 1
            rows, ends = (p if i == 0 else b * p), (b if last else b * p)
            asking = b if last else rows
            linears = [(attention.q_proj, asking), (attention.o_proj, ends)]
            linears += [(x, n) for x in (attention.k_proj, attention.v_proj) for n in (rows, b * m)]
            linears += [(x, ends) for x in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
            products += [(x, random(n, x.in_features)) for x, n in linears]
            queries = groups * (1 if last else p)
            keys = random(b * kv, width, p + m)
            products.append((keys.__rmatmul__, random(b * kv, queries, width)))
            products.append((keys.transpose(1, 2).__rmatmul__, random(b * kv, queries, p + m)))

    @torch.inference_mode()
    def multiply() -> None:
        for multiply_by, left in products:
            multiply_by(left)

    return multiply
