"""`kalm encode` against its ceiling and against other ways to encode the same corpus, in one run.

Each peer (see peers.py) is a process of its own, one at a time, with the threads it would have by
default; the ceiling runs before and after ours, and figures are compared within a round. What a
command spends on starting Ray and loading the model is printed beside tokens/s, not part of it.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path

import lance

from kalm_encoder.matryoshka import num_groups
from kalm_encoder.model.checkpoint import resolve
from tests.bench.data import (
    FOLDER,
    bar,
    nano_checkpoint,
    passages_of,
    spread,
    write_corpus,
)
from tests.bench.forwards import RATIO, ms_marco_lengths

OURS, CEILING = "kalm encode", "ceiling"
PEERS = ("reference", "ray_data")
SHARDS = 4


@dataclass(frozen=True)
class Run:
    """One process that encoded the corpus; what follows `wall_s` is known of ours only.

    Attributes:
        tokens_per_s: Real tokens, from the first read or batch to the last result.
        padding: Share of the computed tokens.
        wall_s: Seconds of the process, from start to end.
        stages: Worker seconds by stage.
        encode_s: Seconds from the first read to the last shard's arrival.
        commit_s: Seconds of all commits together.
        start_s: Seconds from the command's first clock to the first read: Ray, model.
        finish_s: Seconds from the last arrival to the end: last commit, compaction, index.
    """

    tokens_per_s: float
    padding: float
    wall_s: float
    stages: dict[str, float] = field(default_factory=dict)
    encode_s: float = 0.0
    commit_s: float = 0.0
    start_s: float = 0.0
    finish_s: float = 0.0


def main() -> list[str]:
    model = nano_checkpoint()
    runs, bars = _against_peers(model, tokens=40_000, rounds=2, peers=PEERS)
    over_ray_data = statistics.median(ratios_to(runs, "ray_data"))
    return [*bars, bar("encode_over_ray_data", over_ray_data, ">=", 1.3), *_long_passages(model)]


def short() -> list[str]:
    return _against_peers(nano_checkpoint(), tokens=12_000, rounds=1, peers=())[1]


def _against_peers(
    model: str, *, tokens: int, rounds: int, peers: Sequence[str]
) -> tuple[dict[str, list[Run]], list[str]]:
    """Run ours, its ceiling and the peers in each round; the ceiling once more at the start."""
    lengths = ms_marco_lengths(tokens // 40)
    lengths = lengths[: sum(total < tokens for total in accumulate(lengths)) + 1]
    texts = passages_of(resolve(model).tokenizer(), lengths)
    corpus, table = write_corpus(FOLDER / "encode.jsonl", texts), FOLDER / "encode.lance"
    print(f"{len(lengths)} passages, {sum(lengths):,} tokens", flush=True)
    runs: dict[str, list[Run]] = {}

    def note(peer: str, run: Run) -> None:
        runs.setdefault(peer, []).append(run)
        print(f"  {peer}: {run.tokens_per_s:,.0f} tokens/s", flush=True)

    note(CEILING, run_peer(CEILING, model, corpus))
    for _ in range(rounds):
        note(OURS, run_ours(model, corpus, table, "--shard-size", -(-len(texts) // SHARDS)))
        for peer in (CEILING, *peers):
            note(peer, run_peer(peer, model, corpus))
    _print(runs)
    ours = runs[OURS]
    stored = [(run.stages["write"] + run.commit_s) / run.encode_s for run in ours]
    return runs, [
        bar("encode_of_ceiling", statistics.median(ratios_to(runs, CEILING)), ">=", 0.95),
        bar("encode_padding", ours[0].padding, "<=", 0.03),
        bar("store_seconds", statistics.median(stored), "<=", 0.02),
        bar("store_bytes", _bytes_over_minimum(table), "<=", 1.02),
    ]


def ratios_to(runs: dict[str, list[Run]], peer: str) -> list[float]:
    """Speed of ours over a peer's in the same round; the ceiling is the mean around ours."""
    speeds = [run.tokens_per_s for run in runs[peer]]
    if peer == CEILING:
        speeds = [statistics.mean(pair) for pair in pairwise(speeds)]
    return [run.tokens_per_s / other for run, other in zip(runs[OURS], speeds, strict=True)]


def _print(runs: dict[str, list[Run]]) -> None:
    """Print speed, padding and what ours is faster by, and where the time of ours goes."""
    for peer, done in runs.items():
        wall = statistics.median(run.wall_s for run in done)
        faster = "" if peer == OURS else f", ours over it {spread(ratios_to(runs, peer))}"
        print(f"{peer:<12} {spread([run.tokens_per_s for run in done])} tokens/s, "
              f"padding {done[0].padding:.1%}, process {wall:.1f} s{faster}")  # fmt: skip
    run = runs[OURS][-1]
    stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in run.stages.items())
    print(f"worker seconds by stage: {stages}; start-up {run.start_s:.1f} s, encoding "
          f"{run.encode_s:.1f} s, commits {run.commit_s:.2f} s, after the last shard "
          f"{run.finish_s:.1f} s")  # fmt: skip


def _bytes_over_minimum(table: Path) -> float:
    """Return bytes on disk over those of the states, ceil(n / ratio) of them per passage."""
    facts = json.loads(run_process("jobs", "status", table, "--json")[0])
    lengths = lance.dataset(str(table)).to_table(columns=["num_tokens"])["num_tokens"].to_pylist()
    minimum: int = sum(num_groups(n, RATIO) for n in lengths) * facts["dim"] * 2
    return facts["bytes"] / minimum


def _long_passages(model: str) -> list[str]:
    """Compare our forward with the model's own on long passages."""
    printed, _ = run_process("tests.bench.peers", "long_passages", model, 2)
    bars = []
    for name, times in json.loads(printed.splitlines()[-1]).items():
        wall, cpu = ([t[kind] for t in times] for kind in ("wall", "cpu"))
        print(f"{name}: our forward {spread(wall)} times faster by the clock, {spread(cpu)} in CPU")
        bars.append(bar(name, statistics.median(wall), ">=", 2))
    return bars


def run_process(module: str, *arguments: object) -> tuple[str, float]:
    """Run a module in a fresh interpreter; return what it printed and its seconds."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout, time.perf_counter() - began


def run_peer(peer: str, model: str, corpus: Path) -> Run:
    """Run one of peers.py."""
    printed, wall = run_process("tests.bench.peers", peer, model, corpus)
    counts = json.loads(printed.splitlines()[-1])
    padding = 1 - counts["tokens"] / counts["computed"]
    return Run(counts["tokens"] / counts["seconds"], padding, wall)


def run_ours(model: str, corpus: Path, table: Path, *options: object) -> Run:
    """Run `kalm encode` into a new table and read its records."""
    shutil.rmtree(table, ignore_errors=True)
    printed, wall = run_process(
        "jobs", "encode", corpus, "--to", table, "--model", model, "--ratio", RATIO, *options
    )
    found = re.search(r"in ([\d.]+) s: [\d,]+ tokens/s", printed)
    if found is None:
        raise RuntimeError(f"kalm encode printed no tokens/s:\n{printed}")
    shards, commits = read_records(table)
    stages: dict[str, float] = {}
    for shard in shards:
        for stage, seconds in shard["seconds"].items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    # The stages of a shard follow one another; "idle" is the device's, before the shard came.
    spent = [sum(s for stage, s in r["seconds"].items() if stage != "idle") for r in shards]
    began = min(r["at_s"] - seconds for r, seconds in zip(shards, spent, strict=True))
    ended = max(r["at_s"] for r in shards)
    tokens = sum(r["tokens"] for r in shards)
    return Run(
        tokens / (ended - began),
        1 - tokens / sum(r["padded_tokens"] for r in shards),
        wall,
        stages,
        encode_s=ended - began,
        commit_s=sum(commit["seconds"] for commit in commits),
        start_s=began,
        finish_s=float(found[1]) - ended,
    )


def read_records(table: Path) -> tuple[list[dict], list[dict]]:
    """Return the shards and the commits that the run recorded beside its table."""
    lines = [
        json.loads(line)
        for file in sorted(Path(table, "_kalm", "runs").glob("*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    commits = [line for line in lines if line.get("kind") == "commit"]
    return [line for line in lines if line.get("kind") != "commit"], commits
