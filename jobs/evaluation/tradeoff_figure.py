"""Figure of quality against cost: what a byte or a millisecond buys.

Altair does not keep names from covering each other, so `_placed_names` finds a place for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, pairwise, product
from typing import Any

import altair as alt
import numpy as np
from markupsafe import Markup

from jobs.evaluation import figures
from jobs.evaluation.figures import chart_of
from jobs.evaluation.findings import milliseconds, value
from jobs.evaluation.results import SettingResult

KIND_COLOURS = {"first stage": figures.MUTED, "fused": figures.GREEN, "cascade": figures.ORANGE}
DTYPE_COLOURS = (figures.BLUE, "var(--violet)", "var(--rose)", figures.MUTED)
SHAPES = {"fused": "square", "cascade": "M0,-1.2L1.2,0L0,1.2L-1.2,0Z"}
TICKS = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
"""Multiples of powers of ten that may be marked on the axis of costs; the first list that has room
is used."""
HEIGHT_PX = 286
"""Height of the plot."""
NEAR_PX = [(8, 1), (-8, 1), *((dx, dy) for dy in (-11, 13, -22, 24) for dx in (5, -5))]
"""Where a name may begin (right of its point) or end (left of it), by the middle of its height. The
best places come first."""
LETTER_PX, LINE_PX = 7.8, 14
"""Width of a letter and height of a line. The font of the page is not known here, so these are on
the generous side."""

Row = dict[str, Any]
"""What is drawn of a setting."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels of the plot."""
Pixels = Callable[[Row, str], tuple[float, float]]
"""Returns where a row's low, mean or high is in the plot."""


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
    (first,) = _rows(settings[:1], {settings[0].name: 1.0}, metric)
    first["name"] += f" {value(first['mean'])}"
    rows = _rows(settings[1:], costs, metric)
    # Names are written beside the points, so the scale is wider than the costs; one ratio alone
    # would have no width.
    margin = max((rows[-1]["cost"] / rows[0]["cost"]) ** 0.18, 1.2)
    left, right = rows[0]["cost"] / margin, rows[-1]["cost"] * margin
    for before, row in pairwise(rows):  # points of (nearly) one cost stand side by side
        row["cost"] = max(row["cost"], before["cost"] * (right / left) ** (9 / width))
    low = min(row["low"] for row in (first, *rows))
    high = max(row["high"] for row in (first, *rows))
    margin = 0.06 * (high - low) + 0.002
    low, high = low - margin, high + margin

    def pixels(row: Row, end: str) -> tuple[float, float]:
        along = math.log(row["cost"] / left) / math.log(right / left)
        return width * along, HEIGHT_PX * (high - row[end]) / (high - low)

    costs_shown = alt.Axis(values=_ticks(left, right, width), format=",~r", labelFlush=False)
    x = alt.X("cost:Q", axis=costs_shown, scale=alt.Scale(type="log", domain=[left, right]))
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
            (cost, width, HEIGHT_PX + 30, "right", figures.MUTED),
            *_placed_names(first, rows, pixels, width),
        ),
        width=width,
        height=HEIGHT_PX,
    )
    listed = "; ".join(
        f"{row['name']} {value(row['mean'])} at {milliseconds(costs[row['name']])}" for row in rows
    )
    return figures.inline_svg(
        layers, name, f"{metric} against {cost}", f"{first['name']}; {listed}."
    )


def _rows(settings: Sequence[SettingResult], costs: Mapping[str, float], metric: str) -> list[Row]:
    """Return what is drawn of each setting that has a cost, by rising cost."""
    dtypes = dict.fromkeys(s.store_dtype for s in settings if s.kind not in KIND_COLOURS)
    colours = dict(zip(dtypes, DTYPE_COLOURS * len(dtypes), strict=False))
    rows = [
        {
            "name": s.name,
            "kind": s.kind,
            "series": f"{s.kind} {s.store_dtype}",
            "shape": SHAPES.get(s.kind, "circle"),
            "colour": KIND_COLOURS.get(s.kind) or colours[s.store_dtype],
            "cost": costs[s.name],
            "mean": s.metrics[metric],
            "low": s.intervals[metric][0],
            "high": s.intervals[metric][1],
        }
        for s in settings
        if s.name in costs
    ]
    return sorted(rows, key=lambda row: (row["cost"], row["name"]))


def _ticks(low: float, high: float, width: int) -> list[float]:
    """Return round numbers between two costs, as many as have room on the axis."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    for steps in TICKS:
        ticks = [step * 10.0**power for power in powers for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= width / 52:
            break
    return ticks


def _placed_names(
    first: Row, rows: Sequence[Row], pixels: Pixels, width: int
) -> list[figures.Label]:
    """Return where names are written, as `figures.labels` takes it.

    Each name in turn, from the best setting down, takes the place of NEAR_PX where it covers the
    least. To cover another name, or to leave the plot, counts ten times.
    """
    level, plot = pixels(first, "mean")[1], [(0.0, 0.0, width, HEIGHT_PX)]
    drawn: list[Box] = [(0, level - 1.5, width, level + 1.5)]
    for row in rows:
        (x, y), top, bottom = pixels(row, "mean"), pixels(row, "high")[1], pixels(row, "low")[1]
        drawn += [(x - 8, y - 8, x + 8, y + 8), (x - 1.5, top, x + 1.5, bottom)]
    for _, series in groupby(sorted(rows, key=lambda r: r["series"]), key=lambda r: r["series"]):
        for start, end in pairwise(pixels(row, "mean") for row in series):
            drawn += [(x - 1.5, y - 1.5, x + 1.5, y + 1.5) for x, y in np.linspace(start, end, 30)]
    around = [(first, [(float(width), level), (0.0, level)])]
    around += [(row, [pixels(row, "mean")]) for row in sorted(rows, key=lambda r: -r["mean"])]
    names: list[Box] = []
    placed = []
    for row, points in around:
        places = [
            (x + dx, y + dy, "left" if dx > 0 else "right")
            for (x, y), (dx, dy) in product(points, NEAR_PX)
        ]
        boxes = [_box(row["name"], *place) for place in places]
        covered = [
            _shared(box, drawn)
            + 10 * (_shared(box, names) + _shared(box, [box]) - _shared(box, plot))
            for box in boxes
        ]
        best = int(np.argmin(covered))
        names.append(boxes[best])
        placed.append((row["name"], *places[best], row["colour"]))
    return placed


def _box(name: str, x: float, y: float, align: str) -> Box:
    width = LETTER_PX * len(name)
    left = x if align == "left" else x - width
    return left, y - LINE_PX / 2, left + width, y + LINE_PX / 2


def _shared(box: Box, others: Sequence[Box]) -> float:
    """Return the square pixels that a box shares with each of the others, summed."""
    a, b = np.asarray(box), np.asarray(others, dtype=np.float64).reshape(-1, 4)
    sides = np.minimum(a[2:], b[:, 2:]) - np.maximum(a[:2], b[:, :2])
    return float(np.clip(sides, 0, None).prod(axis=1).sum())
