"""The encoder's forward against the model's own for many layouts of heads, and bfloat16 on a CPU.

Weights are random: only speed is measured.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import replace

import torch

from kalm_encoder import PassageEncoder, Reranker
from kalm_encoder.model import onednn
from kalm_encoder.model.checkpoint import DEMO_NAME, resolve
from kalm_encoder.model.in_flight import PassageTokens
from pipeline.estimate.flops import Dimensions
from pipeline.workers.device_threads import keep_freed_memory
from tests.bench.data import QUERY, bar, encode, nano_checkpoint, passages_of, spread, timed
from tests.bench.forwards import RATIO, in_memory, own_forward, random_encoder

MODEL = Dimensions(256, 512, 3, 4, 64, 64, 6144, 1)
"""The model of which the heads are varied."""
KV_HEADS, HEAD_DIMS = (1, 2, 4), (48, 128, 256)
PASSAGES, LENGTH, ROUNDS = 16, 128, 7
CANDIDATES, BFLOAT16_ROUNDS = 100, 3


def main() -> list[str]:
    return [many_kv_heads(), *_bfloat16()]


def many_kv_heads() -> str:
    """Compare the CPU time of the forwards in turns, on one thread each, as in a worker.

    All passages have one length, so that neither has padding.
    """
    tokenizer, threads = resolve(DEMO_NAME).tokenizer(), torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    cpu, medians = torch.device("cpu"), []
    for kv_heads in KV_HEADS:
        for head_dim in HEAD_DIMS:
            dimensions = replace(MODEL, kv_heads=kv_heads, head_dim=head_dim)
            model = random_encoder(dimensions, tokenizer, cpu, torch.float32)
            plain = copy.deepcopy(model)  # ours may pack the weights
            encoder = PassageEncoder(in_memory(model, tokenizer))
            draw = torch.Generator().manual_seed(0)
            ids = torch.randint(10, 5000, (PASSAGES, LENGTH), generator=draw).numpy()
            tokens = [PassageTokens(row, truncated=False) for row in ids]
            batches = encoder.batches(tokens)
            ratios = []
            for round in range(ROUNDS + 1):
                began = time.process_time()
                own_forward(plain, ids)
                theirs = time.process_time() - began
                for batch in batches:
                    encoder.encode_batch(batch, ratio=RATIO)
                ours = time.process_time() - began - theirs
                ratios += [theirs / ours] if round else []  # the first one warms up
            medians.append(statistics.median(ratios))
            print(
                f"{kv_heads} KV heads of {head_dim}: CPU time of its own over ours {spread(ratios)}"
            )
    torch.set_num_threads(threads)
    return bar("many_kv_heads", min(medians), ">=", 1.0)


def _bfloat16() -> list[str]:
    """Compare bfloat16 with float32 of this package, where the CPU has instructions for it."""
    if not onednn.BFLOAT16:
        print("this CPU has no instructions for bfloat16: its bars are left out")
        return []
    model = nano_checkpoint()
    texts = passages_of(resolve(model).tokenizer(), [128] * CANDIDATES)
    uri, ids = encode("bfloat16", texts, model), [str(i) for i in range(CANDIDATES)]
    dtypes = ("float32", "bfloat16")
    encoders = [PassageEncoder(model, dtype=dtype) for dtype in dtypes]
    rerankers = [Reranker.open(uri, dtype=dtype) for dtype in dtypes]
    bars = []
    for name, works in {
        "bfloat16_encode": [lambda e=e: e.encode(texts, ratio=RATIO) for e in encoders],
        "bfloat16_rerank": [lambda r=r: r.rerank(QUERY, ids) for r in rerankers],
    }.items():
        ratios = []
        for round in range(BFLOAT16_ROUNDS + 1):
            exact, half = (timed(work) for work in works)
            ratios += [exact / half] if round else []
        print(f"{name}: {spread(ratios)} times as fast as float32")
        bars.append(bar(name, statistics.median(ratios), ">=", 4.0))
    return bars
