"""Figure of quality against cost: what a byte or a millisecond buys.

Altair does not keep names from covering each other, so `_placed_names` finds a place for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import altair as alt
import numpy as np
from markupsafe import Markup

from jobs.evaluation import figures
from jobs.evaluation.figures import chart_of
from jobs.evaluation.findings import milliseconds, value
from jobs.evaluation.results import SettingResult

COLOURS = {
    "cascade": figures.ORANGE,
    "fused": figures.GREEN,
    "float16": figures.BLUE,
    "float32": figures.MUTED,
    "int8": "var(--violet)",
    "int4": "var(--rose)",
}
"""Colours by kind of setting or, of a single ratio, by stored type."""
SHAPES = {"fused": "square", "cascade": "M0,-1.2L1.2,0L0,1.2L-1.2,0Z"}
HEIGHT_PX = 286
"""Height of the plot."""
NEAR_PX = [(8, 1), (-8, 1), *((dx, dy) for dy in (-11, 13, -22, 24) for dx in (5, -5))]
"""Where a name may begin (right of its point) or end (left of it), by the middle of its height. The
best places come first."""
LETTER_PX, LINE_PX, GAP_PX = 7.8, 14, 4
"""Width of a letter, height of a line, and space around a name. The font of the page is not known
here, so these are on the generous side."""

Row = dict[str, Any]
"""One setting as it is drawn."""


def tradeoff_figure(
    settings: Sequence[SettingResult],
    costs: Mapping[str, float],
    *,
    name: str,
    metric: str,
    cost: str,
    width: int,
) -> Markup:
    """Draw quality against cost, each point with its interval; the first setting is a band.

    Args:
        settings: The first setting, then the others.
        costs: Cost by name of each setting that is drawn as a point, above 0; at least one.
        name: Name of the figure, unique in the page.
        metric: Metric of the vertical axis.
        cost: Label of the horizontal axis, whose scale is logarithmic.
        width: Width of the figure in pixels.
    """
    width -= 50
    first = _row(settings[0], metric, 0.0)
    level = f"{first['name']} {value(first['mean'])}"
    rows = [_row(s, metric, costs[s.name]) for s in settings if s.name in costs]
    rows.sort(key=lambda row: (row["cost"], row["name"]))
    # Names are written beside the points, so the scale is wider than the costs; one ratio alone
    # would have no width.
    margin = max((rows[-1]["cost"] / rows[0]["cost"]) ** 0.18, 1.2)
    left, right = rows[0]["cost"] / margin, rows[-1]["cost"] * margin
    for before, row in pairwise(rows):  # points of (nearly) one cost stand side by side
        row["cost"] = max(row["cost"], before["cost"] * (right / left) ** (9 / width))
    low = min(row["low"] for row in (first, *rows)) - 0.01
    high = max(row["high"] for row in (first, *rows)) + 0.01

    def pixels(row: Row, end: str) -> tuple[float, float]:
        along = math.log(row["cost"] / left) / math.log(right / left)
        return width * along, HEIGHT_PX * (high - row[end]) / (high - low)

    steps = (1, 3) if right > 20 * left else (1, 1.5, 2, 3, 5, 7)
    ticks = [step * 10.0**power for power in range(-3, 9) for step in steps]
    ticks = [tick for tick in ticks if left < tick < right]
    axis = alt.Axis(values=ticks, format=",~r", labelFlush=False, labelBound=8)
    x = alt.X("cost:Q", axis=axis, scale=alt.Scale(type="log", domain=[left, right]))
    axis = alt.Axis(tickCount=6, labelExpr=figures.WITHOUT_ZERO)
    scale = alt.Scale(domain=[low, high], nice=False)
    y, ends = (alt.Y(f"{field}:Q", axis=axis, scale=scale) for field in ("mean", "low"))
    band = chart_of([first])
    points = chart_of(rows).encode(x=x, y=y, color=figures.COLOUR)
    layers = alt.layer(
        band.mark_rect(color="var(--band)").encode(y=ends, y2="high:Q"),
        band.mark_rule(color=figures.MUTED, strokeDash=figures.DASHES).encode(y=y),
        points.mark_rule(opacity=0.45, strokeWidth=1.5).encode(y=ends, y2="high:Q"),
        points.mark_line(strokeWidth=1.5)
        .transform_filter("datum.kind != 'cascade'")
        .encode(detail="series:N"),
        points.mark_point(
            filled=True, opacity=1, size=60, stroke=figures.PAPER, strokeWidth=1
        ).encode(shape=alt.Shape("shape:N", scale=None)),
        figures.labels(
            (metric, 0, -18, "left", figures.MUTED),
            (level, width, -18, "right", figures.MUTED),
            (cost, width, HEIGHT_PX + 30, "right", figures.MUTED),
            *_placed_names(rows, pixels, width),
        ),
        width=width,
        height=HEIGHT_PX,
    )
    listed = "; ".join(
        f"{row['name']} {value(row['mean'])} at {milliseconds(costs[row['name']])}" for row in rows
    )
    return figures.inline_svg(layers, name, f"{metric} against {cost}", f"{level}; {listed}.")


def _row(setting: SettingResult, metric: str, cost: float) -> Row:
    low, high = setting.intervals[metric]
    series = f"{setting.kind} {setting.store_dtype}"
    return {
        "name": setting.name,
        "kind": setting.kind,
        "series": series,
        "shape": SHAPES.get(setting.kind, "circle"),
        "colour": COLOURS.get(setting.kind) or COLOURS.get(setting.store_dtype or ""),
        "cost": cost,
        "mean": setting.metrics[metric],
        "low": low,
        "high": high,
    }


def _placed_names(
    rows: Sequence[Row], pixels: Callable[[Row, str], tuple[float, float]], width: int
) -> list[figures.Label]:
    """Return where names are written, as `figures.labels` takes it.

    Each name in turn, from the best setting down, takes the place of NEAR_PX where it covers the
    least of what is drawn, which is known here as points: many per name, few per line.

    Args:
        rows: The settings by rising cost.
        pixels: Returns where a row's low, mean or high is in the plot.
        width: Width of the plot in pixels.
    """
    drawn = [np.array([pixels(row, "mean")] * 20) for row in rows]
    drawn += [np.linspace(pixels(row, "low"), pixels(row, "high"), 20) for row in rows]
    by_series = sorted(rows, key=lambda row: row["series"])
    for _, series in groupby(by_series, key=lambda row: row["series"]):
        for start, end in pairwise(pixels(row, "mean") for row in series):
            drawn.append(np.linspace(start, end, 30))
    placed: list[figures.Label] = []
    for row in sorted(rows, key=lambda row: -row["mean"]):
        (x, y), taken = pixels(row, "mean"), np.concatenate(drawn)
        length = LETTER_PX * len(row["name"])
        centres = np.array([(x + dx + math.copysign(length / 2, dx), y + dy) for dx, dy in NEAR_PX])
        distances = np.abs(taken - centres[:, None])  # (places, points, 2)
        near = (distances < (length / 2 + GAP_PX, LINE_PX / 2 + GAP_PX)).all(axis=2).sum(axis=1)
        outside = np.maximum(np.abs(centres[:, 0] - width / 2) - (width - length) / 2, 0)
        centre, middle = centres[np.argmin(near + 10 * outside)].tolist()
        left, right = centre - length / 2, centre + length / 2
        drawn += [np.linspace((left, middle + d), (right, middle + d), 40) for d in (-3, 3)]
        side, at = ("left", left) if left > x else ("right", right)
        placed.append((row["name"], at, middle, side, row["colour"]))
    return placed
