"""Resident memory of one half of the model against the whole, each in a fresh process."""

from __future__ import annotations

import subprocess
import sys

from tests.bench.data import bar, nano_checkpoint

SCRIPT = """
import gc, sys, psutil
import torch
import transformers.models.t5gemma2.modeling_t5gemma2
from kalm_encoder import PassageEncoder, QueryDecoder
from transformers import AutoModelForSeq2SeqLM
me = psutil.Process()
before = me.memory_full_info().uss
path, what = sys.argv[1:]
if what == "encoder":
    model = PassageEncoder.load(path)
elif what == "decoder":
    model = QueryDecoder.load(path)
else:
    model = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32)
    for p in model.parameters():
        p.sum()
gc.collect()
print(sum(p.numel() for p in getattr(model, "model", model).parameters()))
print(me.memory_full_info().uss - before, me.memory_info().rss)
"""


def main() -> list[str]:
    model = str(nano_checkpoint())
    own = {}
    for what in ("full", "encoder", "decoder"):
        command = [sys.executable, "-c", SCRIPT, model, what]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        parameters, private, resident = map(int, done.stdout.split())
        own[what] = private
        print(
            f"{what:8} {parameters / 1e6:6.0f}M parameters, {private / 2**20:6.0f} MiB of its own, "
            f"{resident / 2**20:6.0f} MiB resident in all"
        )
    return [
        bar("encoder_memory_share", own["encoder"] / own["full"], "<=", 0.75),
        bar("decoder_memory_share", own["decoder"] / own["full"], "<=", 0.75),
    ]


if __name__ == "__main__":
    print("\n".join(main()))
