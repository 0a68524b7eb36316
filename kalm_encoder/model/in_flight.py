"""Batches of passages under way on a device, and the device's own clock.

A GPU works behind the host's back: what it did when is known from events among its work, and only
once they have passed. A CPU is done when the call returns.
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
    """Token ids of one rendered passage, cut to max_length, and whether it was cut."""

    ids: list[int]
    truncated: bool


class BatchInFlight:
    """A batch that was sent to the device.

    Args:
        tokens: of its passages.
        ratio: it is pooled at.
        pooled: (G, d) float32 on the CPU, valid once the device is done.
        computed: tokens the encoder computed, padding included.
        marks: the device's clock when the batch before in this thread had ended, this one began,
            was through the encoder, and was pooled.
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
        """Wait for the device and return one PassageStates a passage; the same ones every time.

        Any thread may call it.
        """
        with self._taking:
            if self._pooled is not None:
                rows = self._pooled.numpy()
                if not isinstance(self._marks[-1], float):
                    self._marks[-1].synchronize()
                    rows = rows.copy()  # pinned memory is scarce, and the next batch needs it
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
        """Seconds of the device, once `result` has returned: idle before, forward, pool."""
        spans = (_between(a, b) for a, b in pairwise(self._marks))
        return dict(zip(("idle", "forward", "pool"), spans, strict=True))


def mark(device: torch.device) -> Any:
    """Return this moment on the device's clock: seconds, or an event among a GPU's work."""
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
