"""`kalm encode` against its ceiling and against other ways to encode the same corpus, in one run.

Each peer (see peers.py) is a process of its own, one at a time, with the threads it would have by
default; the ceiling runs before and after ours, and figures are compared within a round. What a
command spends on starting Ray and loading the model is printed beside tokens/s, not part of it.

    python -m tests.bench.encode --rounds 1 --distributions ms-marco equal web adversarial
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from kalm_encoder.matryoshka import num_groups
from kalm_encoder.model.checkpoint import resolve
from tests.bench import data
from tests.bench.data import DISTRIBUTIONS, FOLDER, bar, spread
from tests.bench.encode_runs import Run, run_ours, run_peer, run_process
from tests.bench.peers import ORDERS, RATIO, ROWS, fixed_rows, padded_size

OURS, INLINE, CEILING = "kalm encode", "kalm encode --workers 0", "ceiling"
PADDING_ROWS = 1024
SHARDS = 4
FEW_ROWS = 2 * ROWS
"""Of the distributions with long rows: two batches of the padded peers, which take minutes."""


def corpus_of(name: str, tokenizer, tokens: int) -> Path:
    """Write passages of one distribution: about `tokens`, of those with long rows FEW_ROWS."""
    few = name in ("web", "adversarial")
    lengths: list[int] = []
    for length in DISTRIBUTIONS[name](FEW_ROWS if few else tokens):
        if not few and sum(lengths) >= tokens:
            break
        lengths.append(length)
    texts = data.passages_of(tokenizer, lengths)
    print(f"\n{name}: {len(lengths)} passages, {sum(lengths):,} tokens", flush=True)
    return data.write_corpus(FOLDER / f"encode-{name}.jsonl", texts)


def measure(model: str, corpus: Path, rounds: int, table: Path) -> dict[str, list[Run]]:
    """Run every peer in each round; the ceiling once more at the end."""
    rows = corpus.read_text().count("\n")
    shards = ("--shard-size", -(-rows // SHARDS))
    runs: dict[str, list[Run]] = {}

    def note(peer: str, run: Run) -> None:
        runs.setdefault(peer, []).append(run)
        print(f"  {peer}: {run.tokens_per_s:,.0f} tokens/s", flush=True)

    note(CEILING, run_peer(CEILING, model, corpus))
    for _ in range(rounds):
        note(OURS, run_ours(model, corpus, table, *shards))
        inline = FOLDER / "encode-inline.lance"
        note(INLINE, run_ours(model, corpus, inline, *shards, "--workers", 0))
        note(CEILING, run_peer(CEILING, model, corpus))
        for peer in ORDERS:
            note(peer, run_peer(peer, model, corpus))
    return runs


def ratios_to(runs: dict[str, list[Run]], peer: str) -> list[float]:
    """Speed of ours over a peer's in the same round; the ceiling is the mean around ours."""
    speeds = [run.tokens_per_s for run in runs[peer]]
    if peer == CEILING:
        speeds = [statistics.mean(pair) for pair in pairwise(speeds)]
    return [run.tokens_per_s / other for run, other in zip(runs[OURS], speeds, strict=True)]


def print_runs(runs: dict[str, list[Run]]) -> None:
    """Print speed, padding and what ours is faster by."""
    print(f"{'':<24} {'tokens/s':<36} padding  process   ours over it")
    for peer, done in runs.items():
        speed = spread([run.tokens_per_s for run in done])
        wall = statistics.median(run.wall_s for run in done)
        faster = "" if peer in (OURS, INLINE) else spread(ratios_to(runs, peer))
        print(f"{peer:<24} {speed:<36} {done[0].padding:7.1%} {wall:6.1f} s   {faster}")


def print_stages(runs: Sequence[Run]) -> None:
    """Print where the time of `kalm encode` goes."""

    def median(name: str) -> float:
        return statistics.median(getattr(run, name) for run in runs)

    print(f"\n{'stage':<10}  seconds   share   (worker time, median of {len(runs)} runs)")
    for stage in runs[0].stages:
        seconds = statistics.median(run.stages[stage] for run in runs)
        share = statistics.median(run.stages[stage] / sum(run.stages.values()) for run in runs)
        print(f"{stage:<10} {seconds:8.2f}  {share:6.1%}")
    print(
        f"driver: start-up {median('start_s'):.1f} s, encoding {median('encode_s'):.1f} s, of that "
        f"{median('commits'):.0f} recorded commits {median('commit_s'):.2f} s; after the last "
        f"shard {median('finish_s'):.1f} s. With all of that it reports {median('reported'):,.0f} "
        f"tokens/s; the process took {median('wall_s'):.1f} s"
    )


def print_padding(tokenizer) -> None:
    """Print what batches of 32 are padded by, on corpora large enough to say so.

    Sorting by tokens is the best that fixed rows can do; the peers sort by characters, and this
    small tokenizer's pieces differ more in length than the published one's.
    """
    print(f"\npadding of {PADDING_ROWS} passages in batches of {ROWS}")
    print(f"{'':<12}" + "".join(f"{name:>22}" for name in [*ORDERS, "sorted by tokens"]))
    for name, lengths_of in DISTRIBUTIONS.items():
        lengths = lengths_of(PADDING_ROWS)
        texts = data.passages_of(tokenizer, lengths)
        orders = [order(texts) for order in ORDERS.values()]
        orders.append(sorted(range(len(texts)), key=lengths.__getitem__, reverse=True))
        computed = [padded_size(lengths, fixed_rows(order)) for order in orders]
        print(f"{name:<12}" + "".join(f"{1 - sum(lengths) / size:22.1%}" for size in computed))


def store_bars(runs: Sequence[Run], table: Path) -> list[str]:
    """Judge seconds and bytes of storing: write and commit of all the time since the first read.

    `floor` counts the states of each passage, ceil(n / ratio) of them; the floor that `kalm status`
    prints has no such rounding, and is printed beside it.
    """
    import lance

    facts = json.loads(run_process("jobs", "status", table, "--json")[0])
    lengths = lance.dataset(str(table)).to_table(columns=["num_tokens"])["num_tokens"].to_pylist()
    floor = sum(num_groups(n, RATIO) for n in lengths) * facts["dim"] * 2
    plain = facts["bytes_per_token"] / facts["floor_bytes_per_token"]
    print(f"bytes on disk / floor {facts['bytes'] / floor:.4f}, / (tokens / ratio) {plain:.4f}")
    shares = [(run.stages["write"] + run.commit_s) / run.encode_s for run in runs]
    return [
        bar("store_seconds", statistics.median(shares), "<=", 0.02),
        bar("store_bytes", facts["bytes"] / floor, "<=", 1.02),
    ]


def long_passages(model: str, rounds: int) -> list[str]:
    """Print and judge our forward against the model's own on long passages."""
    printed, _ = run_process("tests.bench.peers", "long_passages", model, rounds)
    bars = []
    for name, times in json.loads(printed.splitlines()[-1]).items():
        wall, cpu = ([t[kind] for t in times] for kind in ("wall", "cpu"))
        print(f"{name}: our forward {spread(wall)} times faster by the clock, {spread(cpu)} in CPU")
        bars.append(bar(name, statistics.median(wall), ">=", 2))
    return bars


def main(arguments: Sequence[str] = ()) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=40_000, help="of ms-marco and equal")
    parser.add_argument("--distributions", nargs="+", choices=DISTRIBUTIONS, default=["ms-marco"])
    parser.add_argument("--model", help="another checkpoint than Nano with random weights")
    chosen = parser.parse_args(arguments)
    FOLDER.mkdir(exist_ok=True)
    model = chosen.model or str(data.nano_checkpoint())
    tokenizer = resolve(model).tokenizer()
    print_padding(tokenizer)
    bars = []
    for name in chosen.distributions:
        table = FOLDER / f"encode-{name}.lance"
        corpus = corpus_of(name, tokenizer, chosen.tokens)
        runs = measure(model, corpus, chosen.rounds, table)
        print_runs(runs)
        print_stages(runs[OURS])
        if name == "ms-marco":
            of_ceiling, over = ratios_to(runs, CEILING), ratios_to(runs, "ray_data")
            bars += [
                bar("encode_of_ceiling", statistics.median(of_ceiling), ">=", 0.95),
                bar("encode_over_ray_data", statistics.median(over), ">=", 1.3),
                bar("encode_padding", runs[OURS][0].padding, "<=", 0.03),
                *store_bars(runs[OURS], table),
            ]
    return bars + long_passages(model, chosen.rounds)


if __name__ == "__main__":
    print("\n".join(main(sys.argv[1:])))
