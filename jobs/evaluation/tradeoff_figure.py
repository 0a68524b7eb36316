"""Figure of quality against cost: what a byte or a millisecond buys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from jobs.evaluation.label_places import LabelPlaces
from jobs.evaluation.numerals import count, milliseconds, value
from jobs.evaluation.svg import COLOURS, drawing, inline_svg, plot_area

MARKERS = {"reranked": "o", "cascade": "D", "fused": "s"}
TICKS = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
"""Multiples of powers of ten that may be marked; the densest that has room is."""


@dataclass(frozen=True)
class Point:
    """A setting in a figure of quality against cost.

    Attributes:
        name: of the setting.
        series: kind and store dtype; points of one series are joined and share a colour.
        cost: > 0.
        mean, low, high: of the metric.
    """

    name: str
    series: tuple[str, str]
    cost: float
    mean: float
    low: float
    high: float


def tradeoff_figure(
    points: Sequence[Point],
    first: Point,
    *,
    name: str,
    metric: str,
    cost: str,
    width: int,
) -> Markup:
    """Draw quality against cost, both with their values; the first stage is a band.

    Args:
        points: the other settings, at least one.
        first: the first stage; its cost is not drawn.
        name: of the figure, unique in the page.
        metric: what the vertical axis shows.
        cost: what the horizontal axis shows, on a logarithmic scale.
        width: in pixels.
    """
    colours = _series_colours(points)
    with drawing(width, 360) as figure:
        axes = plot_area(figure, 38, 44, 14, 30)
        axes.set_xlabel(cost, loc="right")
        axes.set_title(metric, loc="left", fontsize=12, color=COLOURS["muted"], x=0, pad=12)
        _set_limits(axes, points, first)
        axes.axhspan(first.low, first.high, color=COLOURS["band"], linewidth=0)
        axes.axhline(first.mean, color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)))
        side_by_side = _apart(points, axes)
        for series in _by_series(side_by_side):
            _draw_series(axes, series, colours[series[0].series])
        _label_points(axes, side_by_side, first, colours)
        listed = "; ".join(
            f"{p.name} {value(p.mean)} at {milliseconds(p.cost)}"
            for p in sorted(points, key=lambda p: p.cost)
        )
        return inline_svg(
            figure, name, f"{metric} against {cost}", f"{first.name} {value(first.mean)}; {listed}."
        )


def _by_series(points: Sequence[Point]) -> list[list[Point]]:
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        groups.setdefault(point.series, []).append(point)
    return [sorted(group, key=lambda p: p.cost) for group in groups.values()]


def _series_colours(points: Sequence[Point]) -> dict[tuple[str, str], str]:
    """Return the colour of each series: by kind, and by dtype among the plainly reranked."""
    plain = cycle(("blue", "violet", "rose", "muted"))
    by_kind = {"fused": "green", "cascade": "orange"}
    series = dict.fromkeys(point.series for point in points)
    return {key: COLOURS[by_kind.get(key[0]) or next(plain)] for key in series}


def _set_limits(axes: Axes, points: Sequence[Point], first: Point) -> None:
    """Make room for all intervals and, at the sides, for names; mark round numbers."""
    axes.set_xscale("log")
    low, high = min(p.cost for p in points), max(p.cost for p in points)
    margin = max((high / low) ** 0.18, 1.2)
    axes.set_xlim(low / margin, high * margin)
    _mark_costs(axes)
    bottom, top = min(p.low for p in (*points, first)), max(p.high for p in (*points, first))
    margin = 0.06 * (top - bottom) + 0.002
    axes.set_ylim(bottom - margin, top + margin)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: value(y).removesuffix("0")))


def _mark_costs(axes: Axes) -> None:
    """Put ticks at round numbers, as many as have room."""
    low, high = axes.get_xlim()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in TICKS:
        ticks = [step * 10.0**power for power in powers for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= axes.bbox.width / 52:
            break
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x) if x >= 10 else f"{x:g}"))


def _apart(points: Sequence[Point], axes: Axes) -> list[Point]:
    """Return the points with those of (nearly) one cost moved apart by 9 pixels."""
    low, high = np.log(axes.get_xlim())
    pixel = (high - low) / axes.bbox.width
    moved: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.name)):
        place = math.log(point.cost)
        if moved:
            place = max(place, math.log(moved[-1].cost) + 9 * pixel)
        moved.append(replace(point, cost=math.exp(place)))
    return [next(m for m in moved if m.name == p.name) for p in points]


def _draw_series(axes: Axes, series: Sequence[Point], colour: str) -> None:
    costs, means = [p.cost for p in series], [p.mean for p in series]
    kind = series[0].series[0]
    axes.vlines(costs, [p.low for p in series], [p.high for p in series], colour, alpha=0.45)
    axes.plot(
        costs,
        means,
        color=colour,
        marker=MARKERS.get(kind, "o"),
        markersize=7 if kind != "cascade" else 6.5,
        markeredgecolor=COLOURS["paper"],
        linestyle="none" if kind == "cascade" else "-",
        linewidth=1.5,
    )


def _label_points(
    axes: Axes, points: Sequence[Point], first: Point, colours: dict[tuple[str, str], str]
) -> None:
    """Write the names, the first stage's before all and then from the best setting down."""
    places, edges = LabelPlaces(axes), axes.get_xlim()
    places.cover_line(edges, [first.mean, first.mean])
    for point in points:
        places.cover_point(point.cost, point.mean)
        places.cover_line([point.cost, point.cost], [point.low, point.high])
    for series in _by_series(points):
        if series[0].series[0] != "cascade":
            places.cover_line([p.cost for p in series], [p.mean for p in series])
    ends = [(edge, first.mean) for edge in reversed(edges)]
    places.write(f"{first.name} {value(first.mean)}", ends, COLOURS["muted"])
    for point in sorted(points, key=lambda p: -p.mean):
        places.write(point.name, [(point.cost, point.mean)], colours[point.series])
