"""Prints an estimate: first what a reader looks for, then the tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from humanize import metric
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from pipeline.estimate.check import Line
    from pipeline.estimate.intervals import Estimate

PRINTED_CHARACTERS = 200
"""Width that tables may take; a terminal that is narrower wraps their lines."""


def print_estimate(facts: dict[str, Any]) -> None:
    """Print an estimate; `facts` is what `kalm plan --json` prints, before it becomes JSON."""
    for name, value in _summary(facts):
        print(f"{name:<14}{value}")
    _print_lengths(facts)
    _print_storage(facts)
    _print_work(facts)


def _summary(facts: dict[str, Any]) -> list[tuple[str, str]]:
    spec, data, index_bytes = facts["spec"], facts["bytes"], facts["index_bytes"].value
    passages, tokens, truncated = (facts[n] for n in ("passages", "tokens", "truncated"))
    cut = _span(truncated.times(1 / passages.value), "{:.2%}")
    size = metric(data.value, "B")
    if data.low < data.high:
        size += f" [{metric(data.low, 'B')} to {metric(data.high, 'B')}]"
    ratios = ",".join(map(str, spec.ratios))
    peak = metric(2 * data.value + index_bytes, "B")
    work = next(w for w in facts["work"] if w["model"] == facts["model"])
    rejected = [("rejected rows", _span(facts["rejected"]))] if facts["rejected"].value else []
    split = []
    if spec.split:
        lost = f"{_span(facts['lost_by_truncation'])} tokens, {facts['lost_share']:.2%} of all"
        split = [
            ("documents", f"{_span(facts['documents'])}, split at {spec.split[0]} tokens"),
            ("truncation", f"would have lost {lost}, at max_length {spec.max_length}"),
        ]
    return [
        *(("reading", line) for line in facts["readings"]),
        ("passages", _span(passages)),
        *split,
        *rejected,
        ("tokens", f"{_span(tokens)}, {tokens.value / passages.value:,.1f} each"),
        ("truncated", f"{cut} at max_length {spec.max_length}"),
        ("table", f"{size} of data ({spec.store_dtype}, r = {ratios})"),
        ("indexes", f"at most about {metric(index_bytes, 'B')}"),
        (
            "peak on disk",
            f"{peak}: compaction writes the data again, `kalm gc` frees the old files",
        ),
        ("encoder", f"{metric(work['encoder_flops'].value, 'FLOP')}, {facts['model']}"),
        ("time", _time(facts, work["hours"])),
        ("sampled", _sampled(facts)),
        *(("note", note) for note in facts["notes"]),
    ]


def _time(facts: dict[str, Any], hours: Estimate | None) -> str:
    rate, gpus = facts["rate"], facts["gpus"]
    if hours is None:
        slow = facts["tokens"].value / 1000 / 3600
        return f"{slow:,.1f} hours at 1,000 tokens/s (give --tokens-per-s or --measure)"
    source, spread = "entered", ""
    if rate.runs:
        source = f"measured on {rate.device}, {rate.runs} runs"
        spread = f" ({rate.low:,.0f} to {rate.high:,.0f})"
    devices = "1 device" if gpus == 1 else f"{gpus} devices, each"
    speed = f"{rate.tokens_per_s:,.0f} tokens/s{spread}, {source}"
    return f"{_span(hours, '{:,.2f}')} hours on {devices} at {speed}"


def _sampled(facts: dict[str, Any]) -> str:
    files = "1 file" if facts["files"] == 1 else f"{facts['files']:,} files"
    seen = f"{facts['sampled_passages']:,} passages of {files}"
    took = f"in {facts['sample_seconds']:,.1f} s"
    if facts["exact"]:
        return f"everything: {seen} {took}; counts are exact"
    blocks = f"{facts['sampled_blocks']:,} blocks, seed {facts['seed']}"
    return f"{seen} {took} ({blocks}); brackets are 95 % intervals"


def _print_lengths(facts: dict[str, Any]) -> None:
    lengths, cuts, passages = facts["lengths"], facts["cuts"], facts["passages"].value
    _print_table(
        [
            ["passage tokens", *lengths],
            ["", *(f"{value:,}" for value in lengths.values())],
            [],
            ["max_length", *(f"{cut['max_length']:,}" for cut in cuts)],
            ["truncated", *(f"{cut['truncated'].value / passages:.1%}" for cut in cuts)],
            ["tokens", *(metric(cut["tokens"].value) for cut in cuts)],
        ]
    )


def _print_storage(facts: dict[str, Any]) -> None:
    shown: dict[tuple[str, str], list[str]] = {}
    for entry in facts["storage"]:
        row = shown.setdefault((entry["model"], entry["store_dtype"]), [])
        row.append(metric(entry["bytes"].value, "B"))
    ratios = dict.fromkeys(entry["ratio"] for entry in facts["storage"])
    rows = [[name, dtype, *sizes] for (name, dtype), sizes in shown.items()]
    _print_table([["data of one ratio", "", *(f"r={ratio}" for ratio in ratios)], *rows], left=2)


def _print_work(facts: dict[str, Any]) -> None:
    """Print what a query of 100 candidates costs, and encoding the corpus, with each model."""
    dtype, prompt = facts["spec"].store_dtype, facts["prompt_tokens"]
    rows = []
    for work in facts["work"]:
        flops, read = work["query_flops"].values(), work["query_bytes"].values()
        hours = f"{work['hours'].value:,.2f}" if work["hours"] else "-"
        encoder = metric(work["encoder_flops"].value)
        rows.append([work["model"], "FLOP", *map(metric, flops), encoder, hours])
        rows.append(["", "read", *(metric(size, "B") for size in read)])
    ratios = (f"r={ratio}" for ratio in facts["work"][0]["query_flops"])
    title = f"a query (100 candidates, {prompt} prompt tokens, {dtype} states), and encoding it all"
    _print_table([["", "", *ratios, "encoder", "hours"], *rows], left=2, title=title)
    if facts["rate"]:
        print("The hours of the other models assume the same FLOP/s.")


def print_comparison(lines: Sequence[Line]) -> None:
    """Print the estimate against the actual values."""
    rows = [["", "planned", "actual", "difference", "within"]]
    for line in lines:
        values = ("-" if v is None else f"{v:,.0f}" for v in (line.planned, line.actual))
        off = "-" if line.difference is None else f"{line.difference:+.2%}"
        within = ""
        if line.interval and line.inside is not None:
            low, high = line.interval
            within = f"{'yes' if line.inside else 'NO'}: {low:,.0f} to {high:,.0f}"
        rows.append([line.name, *values, off, within])
    _print_table(rows)


def _print_table(rows: list[list[str]], *, left: int = 1, title: str = "") -> None:
    """Print rows below an empty line: the first `left` columns to the left, all others right."""
    table = Table.grid(padding=(0, 2))
    for i in range(max(map(len, rows))):
        table.add_column(justify="left" if i < left else "right")
    for row in rows:
        table.add_row(*row)
    print(f"\n{title}" if title else "")
    Console(width=PRINTED_CHARACTERS, markup=False, highlight=False).print(table)


def _span(estimate: Estimate, form: str = "{:,.0f}") -> str:
    """Return a number and its interval, if it has one."""
    value, low, high = (form.format(v) for v in (estimate.value, estimate.low, estimate.high))
    return value if low == high else f"{value} [{low} to {high}]"
