"""The decoder against bare matrix products, hot passages, latency, memory and cold start."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import torch

from kalm_encoder import Reranker
from kalm_encoder.model.batching import make_batches
from kalm_encoder.model.checkpoint import resolve
from kalm_encoder.model.decoder import MAX_PADDING
from tests.bench.data import bar, nano_checkpoint, passages_of, spread
from tests.bench.rerank import QUERY, stored

CANDIDATES, RUNS, QUERIES, PER_QUERY = 100, 3, 200, 8
PRODUCT_CANDIDATES, PRODUCT_RUNS = 31, 11
WORDS = ["read", "write", "file", "line", "memory", "loop", "thread", "socket", "date", "sort"]
COLD = """
import sys, time
for name in ("pandas", "scipy", "PIL"):  # not on a query host; others load them where they are
    sys.modules[name] = None
began = time.perf_counter()
import torch
import transformers.models.t5gemma2.modeling_t5gemma2
imported = time.perf_counter() - began
import psutil
if len(sys.argv) > 1:
    from kalm_encoder import Reranker
    r = Reranker.open(sys.argv[1])
    r.rerank("first query", ["0"])
    print(sum(p.nbytes for p in r.decoder.model.parameters()))
print(psutil.Process().memory_info().rss, imported, time.perf_counter() - began)
"""


def main() -> list[str]:
    model = str(nano_checkpoint())
    texts = passages_of(resolve(model).tokenizer(), [128] * CANDIDATES)
    plain = stored(model, "query128", texts)
    ids = [str(i) for i in range(CANDIDATES)]
    hot = Reranker.open(plain.table.uri, hot_bytes=2 << 30)
    hot.rerank(QUERY, ids)
    with torch.inference_mode():
        products = _products(plain, ids[:PRODUCT_CANDIDATES])
    shares, gains = [], []
    for _ in range(PRODUCT_RUNS):
        whole = _time(lambda: plain.rerank(QUERY, ids[:PRODUCT_CANDIDATES]))
        bare = _time(lambda: _bare(products))
        shares.append(bare / whole)
        print(f"rerank of {PRODUCT_CANDIDATES} {whole:.2f} s, its matrix products {bare:.2f} s")
    for _ in range(RUNS):
        cold = _time(lambda: plain.rerank(QUERY, ids))
        warm = _time(lambda: hot.rerank("another question about " + QUERY[9:], ids))
        gains.append(cold / warm)
        print(f"rerank of {CANDIDATES} {cold:.2f} s, hot {warm:.2f} s")
    print(f"matrix products / rerank {spread(shares)}; hot speed-up {spread(gains)}")
    print(f"hot passages take {hot.decoder.hot.nbytes / CANDIDATES / 2**20:.1f} MiB each")
    bars = [
        bar("decode_of_bare_products", statistics.median(shares), ">=", 0.85),
        bar("hot_speedup", statistics.median(gains), ">=", 3),
    ]
    _latency(plain)
    return [*bars, *_cold(plain.table.uri)]


def _products(reranker: Reranker, ids: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Operands of one rerank's matrix products: in its batches, attention among them."""
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
            products += [(random(n, x.in_features), x.weight.T) for x, n in linears]
            queries = groups * (1 if last else p)
            keys = random(b * kv, width, p + m)
            products.append((random(b * kv, queries, width), keys))
            products.append((random(b * kv, queries, p + m), keys.transpose(1, 2)))
    return products


def _bare(products: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Do the matrix products and nothing else."""
    for left, right in products:
        torch.matmul(left, right)


def _latency(reranker: Reranker) -> None:
    took = []
    for i in range(QUERIES):
        ids = [str((i * 7 + j) % CANDIDATES) for j in range(PER_QUERY)]
        query = " ".join(WORDS[(i * 3 + j) % len(WORDS)] for j in range(3 + i % 9))
        took.append(1000 * _time(lambda ids=ids, query=query: reranker.rerank(query, ids)))
    took.sort()
    p50, p95 = took[len(took) // 2], took[int(len(took) * 0.95)]
    print(
        f"{QUERIES} queries x {PER_QUERY} passages of 128 tokens: p50 {p50:.0f}, p95 {p95:.0f} ms"
    )


def _cold(uri: str) -> list[str]:
    def run(*arguments: str) -> list[float]:
        command = [sys.executable, "-c", COLD, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [float(x) for x in done.stdout.split()]

    empty, imported, _ = run()
    weights, resident, _, whole = run(uri)
    limit = weights * 1.15 + 400 * 2**20
    print(f"imports {imported:.1f} s and {empty / 2**20:.0f} MiB; to the first score {whole:.1f} s")
    print(f"resident {resident / 2**20:.0f} MiB, weights {weights / 2**20:.0f} MiB")
    return [
        bar("resident_of_limit", resident / limit, "<=", 1),
        f"figure cold_start_over_imports {whole / imported:.3g}",
    ]


@torch.inference_mode()
def _time(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    print("\n".join(main()))
