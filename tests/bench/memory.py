"""Resident memory, each in a fresh process: one half of the model against the whole, and a query.

A query process imports no pandas, scipy or PIL, which a query host does not have.
"""

from __future__ import annotations

import subprocess
import sys

from tests.bench.data import QUERY, bar, encode, nano_checkpoint

HALVES = """
import gc, sys, psutil
import torch
import transformers.models.t5gemma2.modeling_t5gemma2
from kalm_encoder import PassageEncoder, QueryDecoder
from transformers import AutoModelForSeq2SeqLM
me = psutil.Process()
before = me.memory_full_info().uss
path, what = sys.argv[1:]
if what == "encoder":
    model = PassageEncoder(path)
elif what == "decoder":
    model = QueryDecoder(path)
else:
    model = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32)
    for p in model.parameters():
        p.sum()
gc.collect()
print(sum(p.numel() for p in getattr(model, "model", model).parameters()))
print(me.memory_full_info().uss - before, me.memory_info().rss)
"""
FIRST_QUERY = """
import sys, time
for name in ("pandas", "scipy", "PIL"):
    sys.modules[name] = None
began = time.perf_counter()
import torch
import transformers.models.t5gemma2.modeling_t5gemma2
imported = time.perf_counter() - began
import psutil
from kalm_encoder import Reranker
reranker = Reranker.open(sys.argv[1])
reranker.rerank(sys.argv[2], ["0"])
print(sum(p.nbytes for p in reranker.decoder.model.parameters()))
print(psutil.Process().memory_info().rss, imported, time.perf_counter() - began)
"""


def main() -> list[str]:
    model = nano_checkpoint()
    own = {}
    for what in ("full", "encoder", "decoder"):
        parameters, own[what], resident = _printed(HALVES, model, what)
        print(
            f"{what:8} {parameters / 1e6:6.0f}M parameters, {own[what] / 2**20:6.0f} MiB of its "
            f"own, {resident / 2**20:6.0f} MiB resident in all"
        )
    table = encode("memory", ["a passage"], model)
    weights, resident, imported, whole = _printed(FIRST_QUERY, table, QUERY)
    print(
        f"a query process: resident {resident / 2**20:.0f} MiB, weights {weights / 2**20:.0f} MiB"
    )
    return [
        bar("encoder_memory_share", own["encoder"] / own["full"], "<=", 0.75),
        bar("decoder_memory_share", own["decoder"] / own["full"], "<=", 0.75),
        bar("resident_of_limit", resident / (weights * 1.15 + 400 * 2**20), "<=", 1),
        f"figure cold_start_over_imports {whole / imported:.3g}",
    ]


def _printed(script: str, *arguments: str) -> list[float]:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(x) for x in done.stdout.split()]
