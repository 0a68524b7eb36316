"""Where to write names in a figure so that they cover as little as possible of what is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from jobs.evaluation.svg import FONT_SIZE

NEAR = (
    (8, 0, "left", "center_baseline"),
    (-8, 0, "right", "center_baseline"),
    (5, 6, "left", "bottom"),
    (5, -6, "left", "top"),
    (-5, 6, "right", "bottom"),
    (-5, -6, "right", "top"),
    (5, 17, "left", "bottom"),
    (5, -17, "left", "top"),
    (-5, 17, "right", "bottom"),
    (-5, -17, "right", "top"),
)
"""Offsets from a point in pixels with the alignment of the text there, the best first."""


class LabelPlaces:
    """What of a plot is covered, and by what names; axes must have their final limits.

    Every decision is greedy: a name goes to the place of NEAR where it covers least, so write the
    important ones first.
    """

    def __init__(self, axes: Axes) -> None:
        self._axes = axes
        self._taken = np.empty((0, 4))  # left, bottom, right, top of boxes, in pixels

    def cover_point(self, x: float, y: float) -> None:
        """Keep names off a marker."""
        self._cover(self._axes.transData.transform([(x, y)]), 5)

    def cover_line(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        """Keep names off a line; they are read over one, but not as easily."""
        corners = self._axes.transData.transform(np.column_stack([xs, ys]))
        for start, end in pairwise(corners):
            steps = max(2, int(np.hypot(*(end - start)) / 5))
            self._cover(np.linspace(start, end, steps), 1.5)

    def write(self, text: str, points: Sequence[tuple[float, float]], colour: str) -> None:
        """Write a name beside a point, or beside the best of several, and cover its place."""
        labels = [
            self._axes.annotate(
                text,
                point,
                (dx, dy),
                textcoords="offset pixels",
                ha=across,
                va=along,
                fontsize=FONT_SIZE,
                color=colour,
                annotation_clip=False,
            )
            for point in points
            for dx, dy, across, along in NEAR
        ]
        boxes = np.array([label.get_window_extent().extents for label in labels])
        best = int(np.argmin([self._covered(box) for box in boxes]))
        self._taken = np.vstack([self._taken, boxes[best]])
        for label in labels[:best] + labels[best + 1 :]:
            label.remove()

    def _cover(self, centres: NDArray[np.float64], reach: float) -> None:
        self._taken = np.vstack([self._taken, np.hstack([centres - reach, centres + reach])])

    def _covered(self, box: NDArray[np.float64]) -> float:
        """Return the pixels a name would cover; those outside the plot count ten times."""
        plot = np.array([self._axes.bbox.extents])
        outside = _shared(box, box[None]) - _shared(box, plot)
        return _shared(box, self._taken) + 10 * outside


def _shared(box: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """Return the pixels that a (4,) box shares with each of the (n, 4) others, summed."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return float(np.clip(sides, 0, None).prod(axis=1).sum())
