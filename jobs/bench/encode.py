"""Pipeline efficiency: tokens/s of `kalm encode` against the bare encoder on packed batches.

The ceiling runs before and after the pipeline in the same call; each in a process of its own.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
import time

from jobs.bench.data import FOLDER, bar, ms_marco_lengths, nano_checkpoint, passages_of, spread

PASSAGES = 3200
CEILING = """
import sys, time, torch
from kalm_encoder import PassageEncoder
encoder = PassageEncoder.load(sys.argv[1])
batch = [[7 + i % 5000 for i in range(128)] for _ in range(16)]
encoder.forward(batch)
began, tokens = time.perf_counter(), 0
while time.perf_counter() - began < float(sys.argv[2]):
    encoder.forward(batch)
    tokens += 16 * 128
print(tokens / (time.perf_counter() - began))
"""


def ceiling(model: str, seconds: float) -> float:
    """Tokens/s of the bare encoder: full batches of one length, all cores, no padding."""
    command = [sys.executable, "-c", CEILING, model, str(seconds)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main(runs: int = 2) -> list[str]:
    from kalm_encoder.checkpoint import resolve

    model = str(nano_checkpoint())
    tokenizer = resolve(model).tokenizer()
    corpus = FOLDER / "corpus.jsonl"
    texts = passages_of(tokenizer, ms_marco_lengths(PASSAGES))
    corpus.write_text(
        "".join(json.dumps({"_id": str(i), "text": t}) + "\n" for i, t in enumerate(texts))
    )
    ratios, ceilings, speeds = [], [], []
    before = ceiling(model, 12)
    for run in range(runs):
        table = FOLDER / "encode.lance"
        shutil.rmtree(table, ignore_errors=True)
        command = [
            sys.executable, "-m", "jobs", "encode", str(corpus), "--to", str(table),
            "--model", model, "--shard-size", "600",
        ]  # fmt: skip
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        wall = time.perf_counter() - began
        after = ceiling(model, 12)
        found = re.search(r"in ([\d.]+) s: ([\d,]+) tokens/s, ([\d.]+)% padding", done.stdout)
        assert found, done.stdout
        speed = float(found[2].replace(",", ""))
        ratios.append(speed / statistics.mean((before, after)))
        ceilings += [before, after]
        speeds.append(speed)
        print(f"run {run}: {found[0]}, process {wall:.0f} s, ceiling {before:.0f} and {after:.0f}")
        print("  " + done.stdout.splitlines()[1])
        before = after
    print(f"bare encoder tokens/s: {spread(ceilings)}")
    print(f"kalm encode tokens/s:  {spread(speeds)}")
    print(f"efficiency:            {spread(ratios)}")
    return [bar("pipeline_efficiency", statistics.median(ratios), ">=", 0.90)]


if __name__ == "__main__":
    print("\n".join(main()))
