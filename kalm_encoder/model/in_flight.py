"""Batches of passages that a device is working on, and the device's own clock.

A GPU works asynchronously: events among its work tell when it did what, and they can be read only
after they have passed. A CPU is done when the call returns.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kalm_encoder.matryoshka import PassageStates, num_groups


@dataclass(frozen=True, slots=True, eq=False)
class PassageTokens:
    """The token ids of one rendered passage, (n,) int64, cut to max_length; and whether it was."""

    ids: NDArray[np.int64]
    truncated: bool


@dataclass(eq=False)
class BatchInFlight:
    """A batch that was sent to the device.

    Attributes:
        tokens: Tokens of its passages.
        computed: Number of tokens that the encoder computed, with padding.
        ratio: Ratio at which it is pooled.
        pooled: (G, d) float32 on the CPU, valid once the device is done; None after `result`.
        marks: The device's clock at four moments: the end of the thread's previous batch, the begin
            of this one, the end of its forward, and the end of its pooling.
    """

    tokens: Sequence[PassageTokens]
    computed: int
    ratio: int
    pooled: torch.Tensor | None
    marks: tuple[Any, Any, Any, Any]
    _states: list[PassageStates] = field(default_factory=list)
    _taking: threading.Lock = field(default_factory=threading.Lock)

    def result(self) -> list[PassageStates]:
        """Wait for the device and return one PassageStates per passage.

        Any thread may call it, and every call returns the same objects.
        """
        with self._taking:
            if self.pooled is not None:
                rows = self.pooled.numpy()
                if not isinstance(self.marks[-1], float):
                    self.marks[-1].synchronize()
                    rows = rows.copy()  # the next batches need the pinned memory, which is scarce
                start = 0
                for passage in self.tokens:
                    length = len(passage.ids)
                    end = start + num_groups(length, self.ratio)
                    self._states.append(PassageStates(rows[start:end], length, passage.truncated))
                    start = end
                self.pooled = None
            return self._states

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of the device (idle before the batch, forward, pool); call `result` first."""
        spans = (_between(a, b) for a, b in pairwise(self.marks))
        return dict(zip(("idle", "forward", "pool"), spans, strict=True))


def mark(device: torch.device) -> Any:
    """Return this moment on the device's clock: seconds on a CPU, an event on a GPU."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))  # the current device may be another one
    return event


def _between(first: Any, second: Any) -> float:
    """Return the seconds between two marks."""
    if isinstance(first, float):
        return float(second - first)
    return float(first.elapsed_time(second)) / 1000
