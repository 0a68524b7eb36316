"""Draws the runs of a table from their records: throughput, padding, and worker time by stage.

The horizontal axis is the time that runs worked; a dashed line marks where a run ended and another
one took up the work. One figure in three formats, by the suffix of the file: .html, .svg or .png.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import altair as alt
import numpy as np
import vl_convert
from numpy.typing import NDArray

from jobs.evaluation.figures import chart_of, theme
from kalm_encoder.errors import InputError
from pipeline.run.records import ShardRecord, totals

SUFFIXES = (".html", ".svg", ".png")
MAX_BINS = 60
"""Largest number of steps drawn over the time worked."""
STAGES = {  # in the order of the work; the colours differ for those who confuse red and green
    # "queued" ("wait" in old records) is left out: a shard that waits for a busy device idles none.
    "read": "#8da0b6",
    "tokenise": "#e0a33e",
    "idle": "#d9d9d9",
    "forward": "#2f6690",
    "pool": "#6fa3c7",
    "convert": "#2f6690",  # in place of encoding, where a table was truncated
    "write": "#81559b",
}
INK = "#33383d"
THEME = theme(INK, "#e6e8ea", font="sans-serif", size=13) | {"background": "white"}
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Runs of a table</title>
<style>svg {{ display: block; margin: auto; max-width: 100%; height: auto }}</style>
{}
</html>
"""


@dataclass(frozen=True)
class Bins:
    """Shards by the time they arrived.

    Attributes:
        edges: (bins + 1,) seconds of work.
        tokens: (bins,) sum of the tokens.
        padded: (bins,) sum of the tokens with padding.
        shards: (bins,) number of shards that arrived.
        seconds: (bins,) sum of the seconds by stage.
        restarts: Seconds at which another run took up the work.
    """

    edges: NDArray[np.float64]
    tokens: NDArray[np.float64]
    padded: NDArray[np.float64]
    shards: NDArray[np.float64]
    seconds: dict[str, NDArray[np.float64]]
    restarts: list[float]


def draw_runs(records: Sequence[ShardRecord], uri: str, file: Path) -> None:
    """Draw all runs of a table into a file.

    Raises:
        InputError: There are no records, or the suffix is none of SUFFIXES.
    """
    if file.suffix not in SUFFIXES:
        raise InputError(f"{file} must end in {', '.join(SUFFIXES)}")
    if not records:
        raise InputError(f"{uri} has no run records: it was made before they were kept")
    heading = alt.Title(f"Encoding {uri}", subtitle=summary(records), offset=24)
    chart = _chart(bin_records(records)).properties(title=heading).to_dict()
    if file.suffix == ".png":
        file.write_bytes(vl_convert.vegalite_to_png(chart, config=THEME, scale=2))
        return
    drawn = vl_convert.vegalite_to_svg(chart, config=THEME)
    file.write_text(PAGE.format(drawn) if file.suffix == ".html" else drawn, encoding="utf-8")


def summary(records: Sequence[ShardRecord]) -> list[str]:
    """Return the runs in two lines."""
    found = totals(records)
    rows = sum(record.rows for record in records)
    workers = len({record.worker for record in records})
    return [
        f"{rows:,} passages, {found.tokens:,} tokens in {found.seconds:,.0f} s: "
        f"{found.tokens_per_s:,.0f} tokens/s, {found.padding:.1%} padding",
        f"{len(records):,} shards, {_counted(workers, 'worker')}, {_counted(found.runs, 'run')}",
    ]


def bin_records(records: Sequence[ShardRecord]) -> Bins:
    """Lay runs end to end and sum their shards up in equal times, a few shards in each."""
    ends = [0.0]
    at: list[float] = []
    ordered = sorted(records, key=lambda record: record.run)
    for _, run in groupby(ordered, key=lambda record: record.run):
        arrivals = [ends[-1] + record.at_s for record in run]
        at += arrivals
        ends.append(max(arrivals))
    count = max(1, min(MAX_BINS, len(ordered) // 4))
    edges = np.linspace(0, max(ends[-1], 1e-3), count + 1)

    def binned(values: list[float]) -> NDArray[np.float64]:
        return np.histogram(at, edges, weights=np.array(values))[0].astype(np.float64)

    stages = [s for s in STAGES if any(s in record.seconds for record in ordered)]
    return Bins(
        edges,
        binned([record.tokens for record in ordered]),
        binned([record.padded_tokens for record in ordered]),
        binned([1.0] * len(ordered)),
        {s: binned([record.seconds.get(s, 0.0) for record in ordered]) for s in stages},
        ends[1:-1],
    )


def _chart(bins: Bins) -> alt.VConcatChart:
    """Return three panels over one axis of time; each step is a bin."""
    units = ((3 * 3600, 3600, "h"), (300, 60, "min"), (0, 1, "s"))
    unit, name = next((unit, name) for least, unit, name in units if bins.edges[-1] >= least)
    rate = bins.tokens / np.diff(bins.edges)
    whole = sum(float(seconds.sum()) for seconds in bins.seconds.values()) or 1.0
    parts = {stage: float(seconds.sum()) / whole for stage, seconds in bins.seconds.items()}
    labels = [f"{s} {part:.0%}" if part >= 0.01 else f"{s} <1%" for s, part in parts.items()]
    # Nothing arrived in an empty bin: its numbers are 0, not 0/0.
    per_shard = [seconds / np.maximum(bins.shards, 1) for seconds in bins.seconds.values()]
    padding = (bins.padded - bins.tokens) / np.maximum(bins.padded, 1)
    columns = np.array([rate, padding, *per_shard])
    # The last bin is there twice, since a step ends where the next one begins.
    lines = np.vstack([bins.edges / unit, np.column_stack([columns, columns[:, -1]])]).T.tolist()
    fields = ("at", "rate", "padding", *labels)
    times = alt.Axis(labelExpr=f"datum.label + ' {name}'", tickCount=8)
    x = alt.X("at:Q", axis=times, scale=alt.Scale(domain=[0, lines[-1][0]], nice=False))
    steps = chart_of([dict(zip(fields, line, strict=True)) for line in lines]).encode(x=x)
    restarts = [{"at": at / unit} for at in bins.restarts]

    def panel(title: str, subtitle: str, height: int, *layers: alt.Chart) -> alt.LayerChart:
        resumed = chart_of(restarts).mark_rule(color=INK, strokeDash=[3, 3]).encode(x=x)
        heading = alt.Title(title, subtitle=subtitle)
        return alt.layer(*layers, resumed, title=heading, width=480, height=height)

    line = {"color": STAGES["forward"], "strokeWidth": 1.6}
    mean = chart_of([{"mean": rate.mean()}]).mark_rule(color=INK, strokeDash=[1, 2])
    words = chart_of(restarts[:1]).mark_text(align="left", dx=4)
    throughput = panel(
        "Throughput",
        f"tokens/s; the dotted line is the mean, {rate.mean():,.0f}",
        220,
        steps.mark_area(color="#c9d9e6", interpolate="step-after", line=line).encode(
            y=alt.Y("rate:Q", axis=alt.Axis(format=",.0f"))
        ),
        mean.encode(y="mean:Q"),
        words.encode(x=x, y=alt.value(10), text=alt.value("resumed")),
    )
    share = panel(
        "Padding",
        "share of computed tokens",
        110,
        steps.mark_line(color=INK, interpolate="step-after").encode(
            y=alt.Y("padding:Q", axis=alt.Axis(format=".1~%", tickCount=3))
        ),
    )
    colours = alt.Scale(domain=labels, range=[STAGES[stage] for stage in parts])
    time = panel(
        "Worker time",
        "seconds per shard, by stage",
        190,
        steps.transform_fold(labels, as_=["stage", "seconds"])
        .transform_calculate(number=f"indexof({labels}, datum.stage)")
        .mark_area(interpolate="step-after")
        .encode(y="seconds:Q", order="number:O", color=alt.Color("stage:N", scale=colours)),
    )
    return alt.vconcat(throughput, share, time, spacing=28).resolve_scale(color="independent")


def _counted(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"
