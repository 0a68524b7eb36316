"""Figures of an evaluation: quality against cost, and the change of each query."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from kalm_eval.numerals import count, milliseconds, signed, value
from kalm_eval.svg import COLOURS, drawing, inline_svg, plot_area

MARKERS = {"reranked": "o", "cascade": "D", "fused": "s"}
BARS = 400
"""Queries drawn one by one; of more, every so many in the order of their change."""


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


def tradeoff(
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
    with drawing(width, 360) as figure:
        axes = plot_area(figure, 38, 44, 14, 30)
        axes.set_xscale("log")
        low, high = min(p.cost for p in points), max(p.cost for p in points)
        margin = max((high / low) ** 0.12, 1.25)
        axes.set_xlim(low / margin, high * margin)
        _mark_costs(axes)
        bottom, top = min(p.low for p in (*points, first)), max(p.high for p in (*points, first))
        axes.set_ylim(bottom - 0.06 * (top - bottom) - 0.002, top + 0.06 * (top - bottom) + 0.002)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: value(y).removesuffix("0")))
        axes.set_xlabel(cost, loc="right")
        axes.set_title(metric, loc="left", fontsize=12, color=COLOURS["muted"], x=0, pad=12)
        axes.axhspan(first.low, first.high, color=COLOURS["band"], linewidth=0)
        axes.axhline(first.mean, color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)))
        side_by_side = _apart(points, axes)
        for colour, series in zip(_series_colours(points), _by_series(side_by_side), strict=True):
            _draw_series(axes, series, COLOURS[colour])
        _label_points(axes, side_by_side, first, _colour_of(points))
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


def _series_colours(points: Sequence[Point]) -> list[str]:
    """Return the colour of each series: by kind, and by dtype among the plainly reranked."""
    plain = iter(("blue", "violet", "rose", "muted") * len(points))
    by_kind = {"fused": "green", "cascade": "orange"}
    return [by_kind.get(series[0].series[0]) or next(plain) for series in _by_series(points)]


def _colour_of(points: Sequence[Point]) -> dict[tuple[str, str], str]:
    series = [group[0].series for group in _by_series(points)]
    return dict(zip(series, _series_colours(points), strict=True))


def _mark_costs(axes: Axes) -> None:
    """Put ticks at 1, 2 and 5 times powers of ten."""
    low, high = axes.get_xlim()
    ticks = [
        step * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for step in (1, 2, 5)
    ]
    axes.xaxis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x) if x >= 1 else f"{x:g}"))


def _apart(points: Sequence[Point], axes: Axes) -> list[Point]:
    """Return the points with those of (nearly) one cost moved apart by 9 pixels."""
    low, high = np.log(axes.get_xlim())
    pixel = (high - low) / axes.bbox.width
    moved: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.name)):
        place = math.log(point.cost)
        if moved:
            place = max(place, math.log(moved[-1].cost) + 9 * pixel)
        moved.append(
            Point(point.name, point.series, math.exp(place), point.mean, point.low, point.high)
        )
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
    """Write each point's name where it covers least of what is drawn."""
    taken = []
    for p in points:
        x, y = axes.transData.transform((p.cost, p.mean))
        taken.append(Bbox.from_extents(x - 5, y - 5, x + 5, y + 5))
        (_, below), (_, above) = axes.transData.transform([(p.cost, p.low), (p.cost, p.high)])
        taken.append(Bbox.from_extents(x - 1, below, x + 1, above))
    _place(
        axes, f"{first.name} {value(first.mean)}", axes.get_xlim()[1], first.mean, "muted", taken
    )
    for p in sorted(points, key=lambda p: -p.mean):
        _place(axes, p.name, p.cost, p.mean, colours[p.series], taken)


def _place(axes: Axes, text: str, x: float, y: float, colour: str, taken: list[Bbox]) -> None:
    """Write a text near a point, inside the axes, and add its box to those that are taken."""
    best: tuple[float, Text, Bbox] | None = None
    for dx, dy, across, along in (
        (8, 0, "left", "center_baseline"),
        (-8, 0, "right", "center_baseline"),
        (5, 6, "left", "bottom"),
        (5, -6, "left", "top"),
        (-5, 6, "right", "bottom"),
        (-5, -6, "right", "top"),
        (5, 16, "left", "bottom"),
        (5, -16, "left", "top"),
        (-5, 16, "right", "bottom"),
        (-5, -16, "right", "top"),
    ):
        label = axes.annotate(
            text,
            (x, y),
            (dx, dy),
            textcoords="offset pixels",
            ha=across,
            va=along,
            fontsize=11,
            color=COLOURS[colour],
            annotation_clip=False,
        )
        box = label.get_window_extent()
        cost = sum(_overlap(box, other) for other in taken) + 10 * _outside(box, axes.bbox)
        if best is None or cost < best[0]:
            if best:
                best[1].remove()
            best = cost, label, box
        else:
            label.remove()
    if best:
        taken.append(best[2])


def _overlap(a: Bbox, b: Bbox) -> float:
    """Return the pixels two boxes share."""
    shared = Bbox.intersection(a, b)
    return 0.0 if shared is None else float(shared.width * shared.height)


def _outside(box: Bbox, axes: Bbox) -> float:
    return box.width * box.height - _overlap(box, axes)


def changes(differences: Sequence[float], *, name: str, title: str, width: int) -> Markup:
    """Draw the change of each query as a bar, from the largest gain to the largest loss.

    Args:
        differences: setting minus first stage, one a query, at least one.
        name: of the figure, unique in the page.
        title: what is shown.
        width: in pixels.
    """
    ordered = np.sort(np.asarray(differences))[::-1]
    better, worse = int((ordered > 0).sum()), int((ordered < 0).sum())
    shown = ordered[np.linspace(0, len(ordered) - 1, min(len(ordered), BARS)).round().astype(int)]
    with drawing(width, 230) as figure:
        axes = plot_area(figure, 44, 12, 8, 12)
        axes.spines["bottom"].set_visible(False)
        reach = max(0.05, float(np.abs(ordered).max())) * 1.1
        axes.set_ylim(-reach, reach)
        axes.set_xlim(-0.5, len(shown) - 0.5)
        axes.xaxis.set_major_locator(NullLocator())
        axes.yaxis.set_major_locator(MaxNLocator(5, symmetric=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: signed(y)))
        places = np.arange(len(shown))
        gap = 0.15 if len(shown) < 150 else 0.0
        for side, colour in ((shown > 0, "green"), (shown < 0, "orange")):
            axes.bar(places[side], shown[side], 1 - gap, color=COLOURS[colour], linewidth=0)
        axes.axhline(0, color=COLOURS["muted"], linewidth=1)
        axes.text(
            0.98,
            0.93,
            f"{count(better)} better",
            transform=axes.transAxes,
            ha="right",
            va="top",
            color=COLOURS["green"],
        )
        axes.text(
            0.02, 0.07, f"{count(worse)} worse", transform=axes.transAxes, color=COLOURS["orange"]
        )
        same = len(ordered) - better - worse
        description = (
            f"{count(better)} queries better, by {value(float(ordered[0]))} at most; {count(same)} "
            f"the same; {count(worse)} worse, by {value(float(abs(ordered[-1])))} at most."
        )
        return inline_svg(figure, name, title, description)
