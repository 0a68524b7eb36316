"""How a plan is printed: what a reader looks for first, then the tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.estimate.check import Line

UNITS = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def plan_text(facts: dict[str, Any]) -> str:
    """Return the plan as aligned lines. `facts` is what `kalm plan --json` prints."""
    parts = [_summary(facts), _lengths(facts), _storage(facts), _query(facts)]
    return "\n\n".join("\n".join(part) for part in parts)


def _summary(facts: dict[str, Any]) -> list[str]:
    spec, passages = facts["spec"], facts["passages"]["value"]
    ratios = ",".join(map(str, spec["ratios"]))
    lines = [
        ("passages", count(facts["passages"])),
        ("tokens", f"{count(facts['tokens'])}, {facts['tokens']['value'] / passages:,.1f} each"),
        ("truncated", f"{_share(facts['truncated'], passages)} at max_length {spec['max_length']}"),
        ("table", f"{size(facts['bytes'])} of data ({spec['store_dtype']}, r = {ratios})"),
        ("indexes", f"up to about {amount(facts['index_bytes']['value'], 'B')}"),
        ("peak on disk", f"{amount(_peak(facts), 'B')}: compaction rewrites, `kalm gc` frees"),
        *_time(facts),
        ("sampled", _sampled(facts)),
    ]
    if facts["rejected"]["value"]:
        lines.insert(1, ("rejected rows", count(facts["rejected"])))
    lines += [("note", note) for note in facts["notes"]]
    return [f"{name:<14}{value}" for name, value in lines]


def _peak(facts: dict[str, Any]) -> float:
    return float(2 * facts["bytes"]["value"] + facts["index_bytes"]["value"])


def _time(facts: dict[str, Any]) -> Iterable[tuple[str, str]]:
    planned = next(w for w in facts["work"] if w["model"] == facts["model"])
    yield "encoder", f"{amount(planned['encoder_flops']['value'], 'FLOP')}, {facts['model']}"
    rate, gpus = facts["rate"], facts["gpus"]
    if rate is None:
        hours = facts["tokens"]["value"] / 1000 / 3600
        yield "time", f"{hours:,.1f} hours at each 1,000 tokens/s (--tokens-per-s, or --measure)"
        return
    source = f"measured on {rate['device']}, {rate['runs']} runs" if rate["runs"] else "entered"
    spread = f" ({rate['low']:,.0f} to {rate['high']:,.0f})" if rate["runs"] else ""
    speed = f"{rate['tokens_per_s']:,.0f} tokens/s{spread}, {source}"
    devices = "1 device" if gpus == 1 else f"{gpus} devices, each"
    yield "time", f"{_span(planned['hours'], '{:,.2f}')} hours on {devices} at {speed}"


def _sampled(facts: dict[str, Any]) -> str:
    files = "1 file" if facts["files"] == 1 else f"{facts['files']:,} files"
    seen = f"{facts['sampled_passages']:,} passages of {files}"
    took = f"in {facts['sample_seconds']:,.1f} s"
    if facts["exact"]:
        return f"everything: {seen} {took}; counts are exact"
    blocks = f"{facts['sampled_blocks']:,} blocks, seed {facts['seed']}"
    return f"{seen} {took} ({blocks}); [ ] are 95 % intervals"


def _lengths(facts: dict[str, Any]) -> list[str]:
    lengths = facts["lengths"]
    cuts, passages = facts["cuts"], facts["passages"]["value"]
    rows = [
        ["passage tokens", *lengths],
        ["", *(f"{value:,}" for value in lengths.values())],
        [""],
        ["max_length", *(f"{cut['max_length']:,}" for cut in cuts)],
        ["truncated", *(f"{cut['truncated']['value'] / passages:.1%}" for cut in cuts)],
        ["tokens", *(amount(cut["tokens"]["value"], "") for cut in cuts)],
    ]
    return table(rows)


def _storage(facts: dict[str, Any]) -> list[str]:
    ratios = sorted({entry["ratio"] for entry in facts["storage"]})
    rows = [["data of one ratio", "", *(f"r={ratio}" for ratio in ratios)]]
    kinds = dict.fromkeys((e["model"], e["store_dtype"]) for e in facts["storage"])
    shown = {(e["model"], e["store_dtype"], e["ratio"]): e["bytes"] for e in facts["storage"]}
    before = ""
    for name, dtype in kinds:
        sizes = (amount(shown[name, dtype, ratio]["value"], "B") for ratio in ratios)
        rows.append([name if name != before else "", dtype, *sizes])
        before = name
    return table(rows, left=2)


def _query(facts: dict[str, Any]) -> list[str]:
    """Return what one query of 100 candidates costs, and the encoder of each model."""
    ratios = sorted(facts["work"][0]["query_flops"], key=int)
    prompt = f"100 candidates, a prompt of {facts['prompt_tokens']} tokens"
    rows = [["", "", *(f"r={ratio}" for ratio in ratios), "encoder", "hours"]]
    dtype = facts["spec"]["store_dtype"]
    for work in facts["work"]:
        flops = (amount(work["query_flops"][r], "") for r in ratios)
        read = (amount(work["query_bytes"][r], "B") for r in ratios)
        hours = f"{work['hours']['value']:,.2f}" if work["hours"] else "-"
        encoder = amount(work["encoder_flops"]["value"], "")
        rows.append([work["model"], "FLOP", *flops, encoder, hours])
        rows.append(["", "read", *read])
    scaled = ["hours of other models: the same rate in FLOP/s"] if facts["rate"] else []
    return [f"{prompt}, {dtype} states; and encoding it all", *table(rows, left=2), *scaled]


def table(rows: list[list[str]], *, left: int = 1) -> list[str]:
    """Align columns: the first `left` to the left, all others to the right."""
    columns = max(map(len, rows))
    widths = [max((len(row[i]) for row in rows if i < len(row)), default=0) for i in range(columns)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def count(estimate: dict[str, float]) -> str:
    """Return a whole number and, where it is one, its interval."""
    return _span(estimate, "{:,.0f}")


def size(estimate: dict[str, float]) -> str:
    """Return bytes and their interval."""
    shown = amount(estimate["value"], "B")
    if estimate["low"] == estimate["high"]:
        return shown
    return f"{shown} [{amount(estimate['low'], 'B')} to {amount(estimate['high'], 'B')}]"


def amount(value: float, unit: str) -> str:
    """Return a number with three digits and a decimal prefix, such as `61.3 GB`."""
    for factor, prefix in (*UNITS, (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}".replace("e+03", "000").rstrip()
    return f"{value:.3g} {unit}".rstrip()


def comparison_text(lines: Sequence[Line]) -> str:
    """Return planned against actual, aligned."""
    rows = [["", "planned", "actual", "difference", "within"]]
    for line in lines:
        planned, actual = (
            "-" if value is None else f"{value:,.0f}" for value in (line.planned, line.actual)
        )
        off = "-" if line.difference is None else f"{line.difference:+.2%}"
        interval = line.interval and " to ".join(f"{v:,.0f}" for v in line.interval)
        rows.append([line.name, planned, actual, off, _judged(line, interval)])
    return "\n".join(table(rows))


def _judged(line: Line, interval: str | None) -> str:
    if line.inside is None:
        return ""
    return f"{'yes' if line.inside else 'NO'}: {interval}"


def _share(estimate: dict[str, float], whole: float) -> str:
    return _span({k: v / whole for k, v in estimate.items()}, "{:.2%}")


def _span(estimate: dict[str, float], form: str) -> str:
    value, low, high = (form.format(estimate[key]) for key in ("value", "low", "high"))
    return value if low == high else f"{value} [{low} to {high}]"
