"""Figure of scores: how P(yes) is distributed, and whether it is a probability."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from jobs.evaluation.numerals import count, value
from jobs.evaluation.results import ScoreSample
from jobs.evaluation.svg import COLOURS, drawing, inline_svg, plot_area

WIDTH, HEIGHT = 340, 420


def score_figure(sample: ScoreSample, *, name: str) -> Markup:
    """Draw two panels over one axis of P(yes), 340 pixels wide.

    Above, the share of the relevant candidates in each bin (upwards) and of the others (downwards),
    each of their own number. Below, the share judged relevant against the mean P(yes) of a bin;
    larger dots are more candidates, and the diagonal is perfect calibration.

    Args:
        sample: of one setting.
        name: of the figure, unique in the page.
    """
    with drawing(WIDTH, HEIGHT) as figure:
        _distribution(figure, sample)
        _reliability(figure, sample)
        listed = "; ".join(
            f"P(yes) {value(mean)}: {value(share)} of {count(n)} relevant"
            for mean, share, n in sample.calibration
        )
        return inline_svg(
            figure,
            name,
            f"Scores of {sample.setting}: distribution and calibration",
            f"{count(sum(sample.relevant))} relevant and {count(sum(sample.other))} other "
            f"candidates. {listed}. Expected calibration error "
            f"{value(sample.expected_calibration_error)}.",
        )


def _distribution(figure: Figure, sample: ScoreSample) -> None:
    axes = plot_area(figure, 40, 240, 10, 24)
    _across(axes)
    axes.tick_params(labelbottom=False)
    axes.spines["bottom"].set_visible(False)
    shares = []
    for counts, colour, sign in ((sample.relevant, "blue", 1), (sample.other, "muted", -1)):
        share = np.asarray(counts) / max(1, sum(counts))
        shares.append(share.max())
        axes.stairs(sign * share, sample.edges, fill=True, color=COLOURS[colour], alpha=0.85)
    axes.set_ylim(-1.08 * shares[1] - 0.001, 1.08 * shares[0] + 0.001)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{abs(y):.0%}".replace("%", " %")))
    axes.axhline(0, color=COLOURS["muted"], linewidth=1)
    for place, anchor, text, colour in (
        (1.03, "bottom", f"↑ {count(sum(sample.relevant))} relevant", "blue"),
        (-0.03, "top", f"↓ {count(sum(sample.other))} other", "muted"),
    ):
        axes.text(0, place, text, transform=axes.transAxes, va=anchor, color=COLOURS[colour])


def _reliability(figure: Figure, sample: ScoreSample) -> None:
    axes = plot_area(figure, 40, 42, 10, 236)
    _across(axes)
    axes.set_ylim(-0.06, 1.06)
    axes.yaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}".replace("%", " %")))
    axes.set_xlabel("P(yes)", loc="right")
    axes.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)))
    means, shares, counts = (np.array(column) for column in zip(*sample.calibration, strict=True))
    axes.plot(means, shares, color=COLOURS["blue"], linewidth=1.2)
    axes.scatter(
        means,
        shares,
        s=22 + 110 * counts / counts.max(),
        color=COLOURS["blue"],
        edgecolor=COLOURS["paper"],
        clip_on=False,
        zorder=3,
    )
    axes.text(
        0,
        1.04,
        "share judged relevant",
        transform=axes.transAxes,
        va="bottom",
        color=COLOURS["blue"],
    )


def _across(axes: Axes) -> None:
    axes.set_xlim(-0.01, 1.01)
    axes.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}".removeprefix("0") or "0"))
