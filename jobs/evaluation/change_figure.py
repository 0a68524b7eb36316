"""Figure of the change of each query."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from jobs.evaluation.numerals import count, signed, value
from jobs.evaluation.svg import COLOURS, drawing, inline_svg, plot_area

MAX_BARS = 400
"""Queries drawn; of more, this many that are evenly spaced in the order of their change."""


def change_figure(differences: Sequence[float], *, name: str, title: str, width: int) -> Markup:
    """Draw the change of each query as a bar, from the largest gain to the largest loss.

    Args:
        differences: setting minus first stage, one a query, at least one.
        name: of the figure, unique in the page.
        title: what is shown.
        width: in pixels.
    """
    ordered = np.sort(np.asarray(differences, dtype=np.float64))[::-1]
    places = np.linspace(0, len(ordered) - 1, min(len(ordered), MAX_BARS)).round().astype(int)
    shown = ordered[places]
    better, worse = int((ordered > 0).sum()), int((ordered < 0).sum())
    with drawing(width, 240) as figure:
        axes = plot_area(figure, 44, 12, 8, 12)
        axes.spines["bottom"].set_visible(False)
        reach = max(0.05, float(np.abs(ordered).max())) * 1.1
        axes.set_ylim(-reach, reach)
        axes.set_xlim(-0.5, len(shown) - 0.5)
        axes.xaxis.set_major_locator(NullLocator())
        axes.yaxis.set_major_locator(MaxNLocator(5, symmetric=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _short(y)))
        bar = 0.85 if len(shown) < width / 5 else 1.0
        for side, colour in ((shown > 0, "green"), (shown < 0, "orange")):
            axes.bar(np.flatnonzero(side), shown[side], bar, color=COLOURS[colour], linewidth=0)
        axes.axhline(0, color=COLOURS["muted"], linewidth=1)
        same = len(ordered) - better - worse
        for x, y, across, along, text, colour in (
            (0.005, -9, "left", "top", f"{count(better)} better", "green"),
            (0.995, 7, "right", "bottom", f"{count(worse)} worse", "orange"),
        ):
            axes.annotate(
                text,
                (x, 0.5),
                (0, y),
                xycoords="axes fraction",
                textcoords="offset pixels",
                ha=across,
                va=along,
                color=COLOURS[colour],
            )
        best, worst = max(float(ordered[0]), 0.0), max(-float(ordered[-1]), 0.0)
        description = (
            f"{count(better)} queries better, by {value(best)} at most; {count(same)} the same; "
            f"{count(worse)} worse, by {value(worst)} at most."
        )
        return inline_svg(figure, name, title, description)


def _short(number: float) -> str:
    """Return a signed number without zeros at its end: +.25, 0."""
    return signed(number).rstrip("0").rstrip(".") or "0"
