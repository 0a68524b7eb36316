"""Figures of the report: how scores are distributed, whether they are calibrated, who gained.

Altair draws a figure when the report is written, as an <svg> element: the page needs no script for
it. Colours are CSS variables of the page, so that figures follow its light and its dark scheme, and
the font is that of the page.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import vl_convert
from markupsafe import Markup

from jobs.evaluation.findings import value
from jobs.evaluation.results import ScoreSample

MAX_BARS = 400
"""Largest number of queries drawn; of more, this many are drawn, evenly spaced in their order."""
MUTED, PAPER, BLUE = "var(--muted)", "var(--paper)", "var(--blue)"
GREEN, ORANGE = "var(--green)", "var(--orange)"
DASHES = [4, 3]
"""Lengths in pixels of a dash and of the gap after it."""
UNIT = alt.Scale(domain=[0, 1])
Label = tuple[str, float, float, str, str]
"""A text, its x and y in pixels of the plot, the side of it that is there, and its colour."""
COLOUR = alt.Color("colour:N", scale=None)
"""The colour of a row is what its field `colour` holds."""
# Expressions of Vega for the labels of an axis: .475 instead of 0.475, and 20 % instead of -0.2.
WITHOUT_ZERO = "datum.value ? replace(datum.label, '0.', '.') : '0'"
PERCENT = "format(100 * abs(datum.value), '.0f') + ' %'"


def theme(colour: str, grid: str, *, font: str, size: int) -> dict[str, Any]:
    """Return the configuration of a chart: horizontal grid lines, and no other ink than needed."""
    text = {"labelColor": colour, "labelFontSize": size, "title": None}
    return {
        "axis": text | {"domain": False, "gridColor": grid, "labelPadding": 6, "ticks": False},
        "axisX": {"domain": True, "domainColor": grid, "grid": False},
        # All plots begin at the same distance from the left edge, whatever their labels.
        "axisY": {"maxExtent": 3.5 * size, "minExtent": 3.5 * size},
        "background": None,
        "font": font,
        "legend": text | {"orient": "top"},
        "text": {"baseline": "middle", "color": colour, "fontSize": size},
        "title": {
            "anchor": "start",
            "fontSize": size + 3,
            "frame": "group",
            "offset": 12,
            "subtitleFontSize": size,
            "subtitlePadding": 5,
        },
        "view": {"stroke": None},
    }


def chart_of(rows: Sequence[dict[str, Any]]) -> alt.Chart:
    """Return a chart of rows, with nothing drawn yet."""
    return alt.Chart(alt.Data(values=rows))


ZERO_LINE = chart_of([{}]).mark_rule(color=MUTED).encode(y=alt.datum(0))


def labels(*texts: Label) -> alt.Chart:
    """Return texts at their places."""
    fields = ("label", "label_x", "label_y", "align", "colour")
    drawn = chart_of([dict(zip(fields, text, strict=True)) for text in texts])
    return drawn.mark_text(align=alt.expr("datum.align")).encode(
        x=alt.X("label_x:Q", axis=None, scale=None),
        y=alt.Y("label_y:Q", axis=None, scale=None),
        text="label:N",
        color=COLOUR,
    )


def inline_svg(chart: alt.Chart, name: str, title: str, description: str) -> Markup:
    """Return a chart as an <svg> element of a page.

    Args:
        chart: What to draw, in colours of the page.
        name: Name of the figure, unique in the page.
        title: What is shown, for those who do not see it.
        description: What can be seen in it.
    """
    config = theme(MUTED, "var(--rule)", font="inherit", size=12)
    drawn = vl_convert.vegalite_to_svg(chart.to_dict(), config=config)
    # The root is written anew: the page sets the size, and a screen reader needs title and <desc>.
    _, width, height, inside = re.split(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)">', drawn, maxsplit=1)
    return Markup(
        '<svg viewBox="0 0 {1} {2}" style="max-width: {1}px" role="img" '
        'aria-labelledby="{0}-title {0}-desc"><title id="{0}-title">{3}</title>'
        '<desc id="{0}-desc">{4}</desc>{5}'
    ).format(name, width, height, title, description, Markup(inside))


def score_figure(sample: ScoreSample, *, name: str) -> Markup:
    """Draw two panels over one axis of P(yes), 340 pixels wide.

    The upper one shows the share of the relevant candidates in each bin (upwards) and of the others
    (downwards), each of their own number. The lower one shows the share judged relevant against the
    mean P(yes) of a bin: larger dots are more candidates, and the diagonal is perfect calibration.

    Args:
        sample: Scores of one setting.
        name: Name of the figure, unique in the page.
    """
    size = {"width": 295, "height": 140}
    relevant, other = sum(sample.relevant), sum(sample.other)
    bars: list[dict[str, Any]] = [
        {"p": low, "end": high, "share": n / (whole or 1), "colour": colour}
        for counts, whole, colour in (
            (sample.relevant, relevant, BLUE),
            (sample.other, -other, MUTED),
        )
        for low, high, n in zip(sample.edges, sample.edges[1:], counts, strict=False)
    ]
    distribution = chart_of(bars).encode(
        x=alt.X("p:Q", axis=None, scale=UNIT),
        x2="end:Q",
        y=alt.Y("share:Q", axis=alt.Axis(labelExpr=PERCENT, tickCount=3)),
        y2=alt.datum(0),
        color=COLOUR,
    )
    upper = alt.layer(
        distribution.mark_rect(opacity=0.85),
        ZERO_LINE,
        labels(
            (f"↑ {relevant:,} relevant", 0, -10, "left", BLUE),
            (f"↓ {other:,} other", 0, 152, "left", MUTED),
        ),
        **size,
    )
    axis = alt.Axis(format=".2~f", labelExpr=WITHOUT_ZERO, values=[0, 0.25, 0.5, 0.75, 1])
    x = alt.X("p:Q", axis=axis, scale=UNIT)
    y = alt.Y("share:Q", axis=alt.Axis(labelExpr=PERCENT, values=[0, 0.5, 1]), scale=UNIT)
    bins = [{"p": p, "share": share, "n": n} for p, share, n in sample.calibration]
    curve = chart_of(bins).encode(x=x, y=y)
    diagonal = chart_of([{"p": p, "share": p} for p in (0, 1)]).encode(x=x, y=y)
    dots = alt.Size("n:Q", scale=alt.Scale(range=[25, 130]), legend=None)
    lower = alt.layer(
        diagonal.mark_line(color=MUTED, strokeWidth=1, strokeDash=DASHES),
        curve.mark_line(color=BLUE, strokeWidth=1.2),
        curve.mark_circle(color=BLUE, opacity=1, stroke=PAPER).encode(size=dots),
        labels(
            ("share judged relevant", 0, -16, "left", BLUE), ("P(yes)", 295, 172, "right", MUTED)
        ),
        **size,
    )
    listed = "; ".join(
        f"P(yes) {value(mean)}: {value(share)} of {n:,} relevant"
        for mean, share, n in sample.calibration
    )
    return inline_svg(
        alt.vconcat(upper, lower, bounds="flush", spacing=60),
        name,
        f"Scores of {sample.setting}: distribution and calibration",
        f"{relevant:,} relevant and {other:,} other candidates. {listed}. "
        f"Expected calibration error {value(sample.expected_calibration_error)}.",
    )


def change_figure(differences: Sequence[float], *, name: str, width: int) -> Markup:
    """Draw the change of each query as a bar, from the largest gain to the largest loss.

    Args:
        differences: Setting minus first setting per query, at least one.
        name: Name of the figure, unique in the page.
        width: Width of the figure in pixels.
    """
    ordered = np.sort(np.asarray(differences, dtype=np.float64))[::-1]
    places = np.linspace(0, len(ordered) - 1, min(len(ordered), MAX_BARS)).round().astype(int)
    better, worse = int((ordered > 0).sum()), int((ordered < 0).sum())
    reach = max(0.05, float(np.abs(ordered).max())) * 1.1
    bars = [
        {"x": i, "end": i + 0.9, "change": change, "colour": GREEN if change > 0 else ORANGE}
        for i, change in enumerate(ordered[places].tolist())
    ]
    changes = alt.Axis(format="+f", labelExpr=WITHOUT_ZERO, tickCount=5)
    drawn = chart_of(bars).mark_rect().encode(
        x=alt.X("x:Q", axis=None, scale=alt.Scale(domain=[0, len(places)], nice=False)),
        x2="end:Q",
        y=alt.Y("change:Q", axis=changes, scale=alt.Scale(domain=[-reach, reach], nice=False)),
        y2=alt.datum(0),
        color=COLOUR,
    )  # fmt: skip
    texts = labels(
        (f"{better:,} better", 3, 123, "left", GREEN),
        (f"{worse:,} worse", width - 59, 95, "right", ORANGE),
    )
    description = (
        f"{better:,} queries better, by {value(max(ordered[0], 0.0))} at most; "
        f"{len(ordered) - better - worse:,} the same; "
        f"{worse:,} worse, by {value(max(-ordered[-1], 0.0))} at most."
    )
    chart = alt.layer(drawn, ZERO_LINE, texts, width=width - 56, height=216)
    return inline_svg(chart, name, "Change of each query", description)
