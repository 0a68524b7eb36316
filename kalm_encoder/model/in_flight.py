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

from kalm_encoder.matryoshka import PackedStates, num_groups


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
        pooled: (G, d) states on the CPU and (G,) whether each is within the limit, both valid once
            the device is done; None after `result`.
        marks: The device's clock at four moments: the end of the thread's previous batch, the begin
            of this one, the end of its forward, and the end of its pooling.
    """

    tokens: Sequence[PassageTokens]
    computed: int
    ratio: int
    pooled: tuple[torch.Tensor, torch.Tensor] | None
    marks: tuple[Any, Any, Any, Any]
    _result: tuple[PackedStates, NDArray[np.bool_]] | None = None
    _taking: threading.Lock = field(default_factory=threading.Lock)

    def result(self) -> tuple[PackedStates, NDArray[np.bool_]]:
        """Wait for the device; return the passages and (b,) whether each is within the limit.

        Any thread may call it, and every call returns the same objects. Behind a GPU the states lie
        in pinned memory, which the next batches need as soon as they are copied or written.
        """
        with self._taking:
            if self._result is None:
                self._result = self._take()
            return self._result

    def _take(self) -> tuple[PackedStates, NDArray[np.bool_]]:
        assert self.pooled is not None
        states, within = (tensor.numpy() for tensor in self.pooled)
        if not isinstance(self.marks[-1], float):
            self.marks[-1].synchronize()
        self.pooled = None
        lengths = np.array([len(passage.ids) for passage in self.tokens])
        groups = num_groups(lengths, self.ratio)
        storable = np.logical_and.reduceat(within, groups.cumsum() - groups)
        truncated = np.array([passage.truncated for passage in self.tokens])
        return PackedStates(states, lengths, truncated), storable

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
