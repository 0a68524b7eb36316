"""What encode.py compares: `kalm encode` and its peers, each run as a process of its own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.peers import RATIO


@dataclass(frozen=True)
class Run:
    """One process that encoded the corpus.

    Attributes:
        tokens_per_s: real tokens, from the first read or batch to the last result.
        padding: share of computed tokens.
        wall_s: of the process, start to end.
        stages: worker seconds by stage; from here on of ours only.
        encode_s: from the first read to the last shard's arrival.
        commits, commit_s: how many, and their seconds together.
        reported: tokens/s as the command says, with its start-up.
        start_s: from the command's first clock to the first read: Ray, model.
        finish_s: from the last arrival to the command's last clock: last commit, compaction, index.
    """

    tokens_per_s: float
    padding: float
    wall_s: float
    stages: dict[str, float] = field(default_factory=dict)
    encode_s: float = 0.0
    commits: int = 0
    commit_s: float = 0.0
    reported: float = 0.0
    start_s: float = 0.0
    finish_s: float = 0.0


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
    found = re.search(r"in ([\d.]+) s: ([\d,]+) tokens/s", printed)
    if found is None:
        raise RuntimeError(f"kalm encode printed no tokens/s:\n{printed}")
    shards, commits = read_run(table)
    stages: dict[str, float] = {}
    for shard in shards:
        for stage, seconds in shard["seconds"].items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    # A shard's stages follow one another; "idle" is the device's, before the shard came.
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
        commits=len(commits),
        commit_s=sum(commit["seconds"] for commit in commits),
        reported=float(found[2].replace(",", "")),
        start_s=began,
        finish_s=float(found[1]) - ended,
    )


def read_run(table: Path) -> tuple[list[dict], list[dict]]:
    """Return the shards and the commits that the run recorded beside its table."""
    lines = [
        json.loads(line)
        for file in sorted(Path(table, "_kalm", "runs").glob("*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    commits = [line for line in lines if line.get("kind") == "commit"]
    return [line for line in lines if line.get("kind") != "commit"], commits
