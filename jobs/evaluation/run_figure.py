"""Draws the runs of a table from their records: tokens a second, padding, seconds by stage.

The x axis is the time that runs worked; where a run ended and another took up the work is a thin
line. One figure in three formats, by the file's suffix: .html, .svg or .png.
"""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter
from numpy.typing import NDArray

from kalm_encoder.errors import InputError
from pipeline.run.records import ShardRecord, totals

SUFFIXES = (".html", ".svg", ".png")
MOST_BINS = 60
STAGES = {  # in the order of the work; colours tell apart without red and green
    # Not "queued" ("wait" of old): a shard that waits for a busy device is no idleness.
    "read": "#8da0b6",
    "tokenise": "#e0a33e",
    "idle": "#d9d9d9",
    "forward": "#2f6690",
    "pool": "#6fa3c7",
    "write": "#81559b",
}
INK, GRID = "#33383d", "#e6e8ea"
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ margin: 2rem auto; max-width: 46rem; padding: 0 1rem; color: #33383d;
  font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.25rem; overflow-wrap: anywhere; }}
div {{ overflow-x: auto; }}
svg {{ display: block; width: 100%; min-width: 22rem; height: auto; }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
<div>{svg}</div>
</html>
"""


@dataclass(frozen=True)
class Bins:
    """Shards by the time they arrived.

    Attributes:
        edges: (bins + 1,) seconds of work.
        tokens, padded: (bins,) sums.
        shards: (bins,) how many arrived.
        seconds: (bins,) sums by stage.
        restarts: seconds at which another run took up the work.
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
        InputError: no records, or a suffix other than SUFFIXES.
    """
    if file.suffix not in SUFFIXES:
        raise InputError(f"{file} must end in {', '.join(SUFFIXES)}")
    if not records:
        raise InputError(f"{uri} has no run records: it was made before they were kept")
    figure = _figure(bin_records(records))
    if file.suffix != ".html":
        figure.savefig(file, dpi=200)
        return
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    svg = drawn.getvalue()
    page = PAGE.format(
        title=html.escape(f"Encoding {uri}"),
        summary=html.escape(summary(records)),
        svg=svg[svg.index("<svg") :],
    )
    file.write_text(page, encoding="utf-8")


def summary(records: Sequence[ShardRecord]) -> str:
    """Return the runs in one sentence."""
    found = totals(records)
    rows = sum(record.rows for record in records)
    workers = len({record.worker for record in records})
    return (
        f"{rows:,} passages, {found.tokens:,} tokens in {found.seconds:,.0f} s: "
        f"{found.tokens_per_s:,.0f} tokens/s, {found.padding:.1%} padding, "
        f"{len(records):,} shards, {_counted(workers, 'worker')}, {_counted(found.runs, 'run')}."
    )


def bin_records(records: Sequence[ShardRecord]) -> Bins:
    """Lay runs end to end and sum their shards up in equal times, a few shards in each."""
    runs: dict[str, list[ShardRecord]] = {}
    for record in records:
        runs.setdefault(record.run, []).append(record)
    at: list[float] = []
    ordered: list[ShardRecord] = []
    ends = [0.0]
    for run in sorted(runs):
        at += [ends[-1] + record.at_s for record in runs[run]]
        ordered += runs[run]
        ends.append(ends[-1] + max(record.at_s for record in runs[run]))
    count = max(1, min(MOST_BINS, len(ordered) // 4))
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


def _figure(bins: Bins) -> Figure:
    figure = Figure(figsize=(6.4, 8.4))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    rate, padding, stages = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 3])
    unit, name = _time_unit(float(bins.edges[-1]))
    edges, width = bins.edges / unit, np.diff(bins.edges)
    _draw_rate(rate, edges, bins.tokens / width)
    empty = bins.padded == 0
    share = np.where(empty, np.nan, 1 - bins.tokens / np.where(empty, 1, bins.padded))
    padding.stairs(share, edges, color=INK, linewidth=1.6, baseline=None)
    top = max(0.05, 1.25 * float(np.nanmax(share)))
    padding.set_ylim(0, top)
    padding.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if top > 0.1 else None))
    _title(padding, "Padding", "share of computed tokens")
    _draw_stages(stages, edges, bins)
    stages.set_xlabel(f"time worked ({name})")
    stages.set_xlim(edges[0], edges[-1])
    for axes in (rate, padding, stages):
        for restart in bins.restarts:
            axes.axvline(restart / unit, ymax=0.8, color=INK, linewidth=0.8, linestyle=(0, (3, 3)))
    if bins.restarts:
        within = rate.get_xaxis_transform()
        rate.text(bins.restarts[0] / unit, 0.8, " resumed", transform=within, va="top", fontsize=10)
    return figure


def _draw_rate(axes: Axes, edges: NDArray[np.float64], rate: NDArray[np.float64]) -> None:
    axes.stairs(rate, edges, fill=True, color="#c9d9e6")
    axes.stairs(rate, edges, color="#2f6690", linewidth=1.6)
    mean = float(rate.mean())
    axes.axhline(mean, color=INK, linewidth=1, linestyle=(0, (1, 2)))
    axes.set_ylim(0, 1.15 * max(float(rate.max()), 1e-9))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _title(axes, "Throughput", f"tokens/s; the dotted line is the mean, {mean:,.0f}")


def _draw_stages(axes: Axes, edges: NDArray[np.float64], bins: Bins) -> None:
    """Stack the mean seconds of a shard by stage; a stage that never shows has no place in it."""
    below = np.zeros(len(bins.shards))
    shards = np.where(bins.shards == 0, 1, bins.shards)
    whole = sum(float(s.sum()) for s in bins.seconds.values()) or 1.0
    for stage, seconds in bins.seconds.items():
        above = below + seconds / shards
        part = float(seconds.sum()) / whole
        label = f"{stage} {part:.0%}" if part >= 0.01 else f"{stage} <1%"
        axes.stairs(above, edges, baseline=below, fill=True, color=STAGES[stage], label=label)
        below = above
    axes.set_ylim(0, 1.35 * max(float(below.max()), 1e-9))
    axes.legend(
        ncols=len(bins.seconds), frameon=False, fontsize=10, loc="upper left",
        handlelength=0.8, handletextpad=0.4, columnspacing=0.9, borderaxespad=0,
    )  # fmt: skip
    _title(axes, "Worker time", "seconds a shard, by stage")


def _title(axes: Axes, name: str, unit: str) -> None:
    axes.set_title(f"{name}", loc="left", fontsize=13, fontweight="bold", color=INK, pad=22)
    axes.text(0, 1.03, unit, transform=axes.transAxes, fontsize=10.5, color=INK, va="bottom")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#9aa0a6")
    axes.tick_params(length=0, labelsize=10.5, colors=INK)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)


def _time_unit(seconds: float) -> tuple[float, str]:
    if seconds < 300:
        return 1.0, "seconds"
    return (60.0, "minutes") if seconds < 3 * 3600 else (3600.0, "hours")


def _counted(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"
