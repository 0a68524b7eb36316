"""Batches of passages that a device is working on, and the device's own clock.

A GPU works asynchronously: events among its work tell when it did what, and they can be read only
after they have passed. A CPU is done when the call returns.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kalm_encoder.matryoshka import PassageStates, num_groups


@dataclass(frozen=True, slots=True)
class PassageTokens:
    """The token ids of one rendered passage, cut to max_length, and whether it was cut."""

    ids: list[int]
    truncated: bool


class BatchInFlight:
    """A batch that was sent to the device.

    Args:
        tokens: Tokens of its passages.
        ratio: Ratio at which it is pooled.
        pooled: (G, d) float32 on the CPU; the values are valid once the device is done.
        computed: Number of tokens that the encoder computed, with padding.
        marks: The device's clock at four moments: the end of the thread's previous batch, the begin
            of this one, the end of its forward, and the end of its pooling.
    """

    def __init__(
        self,
        tokens: Sequence[PassageTokens],
        ratio: int,
        pooled: torch.Tensor,
        computed: int,
        marks: tuple[Any, Any, Any, Any],
    ) -> None:
        self.tokens = tokens
        self.computed = computed
        self._ratio = ratio
        self._pooled: torch.Tensor | None = pooled
        self._marks = marks
        self._states: list[PassageStates] = []
        self._taking = threading.Lock()

    def result(self) -> list[PassageStates]:
        """Wait for the device and return one PassageStates per passage.

        Any thread may call it, and every call returns the same objects.
        """
        with self._taking:
            if self._pooled is not None:
                rows = self._pooled.numpy()
                if not isinstance(self._marks[-1], float):
                    self._marks[-1].synchronize()
                    rows = rows.copy()  # the next batches need the pinned memory, which is scarce
                self._states, self._pooled = self._cut(rows), None
            return self._states

    def _cut(self, rows: NDArray[np.float32]) -> list[PassageStates]:
        states = []
        start = 0
        for passage in self.tokens:
            length = len(passage.ids)
            end = start + num_groups(length, self._ratio)
            states.append(PassageStates(rows[start:end], length, passage.truncated))
            start = end
        return states

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of the device (idle before the batch, forward, pool); call `result` first."""
        spans = (_between(a, b) for a, b in pairwise(self._marks))
        return dict(zip(("idle", "forward", "pool"), spans, strict=True))


def mark(device: torch.device) -> Any:
    """Return this moment on the device's clock: seconds on a CPU, an event on a GPU."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _between(first: Any, second: Any) -> float:
    """Return the seconds between two marks."""
    if isinstance(first, float):
        return float(second - first)
    return float(first.elapsed_time(second)) / 1000
