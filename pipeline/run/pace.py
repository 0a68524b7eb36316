"""How fast a run is, and how long it will still take: arithmetic on arrivals, no clock of its own.

The rule. Speed is the sum over workers of tokens / time in the last WINDOW_S (or in the last
WINDOW_SHARDS of all, where those took longer), each worker from one arrival to another; a worker's
first shard counts from when the worker began on it, so no start-up does, nor anything that earlier
runs did. A worker that is overdue by more than one of its shards slows down from then on, so that a
stalled run does not pretend. What remains is its size (bytes, or rows where files have no byte
ranges) times the tokens a byte of this run; what workers have done since their last arrival is
taken off, at most a shard each. The last shards end one after another: with w workers at work that
costs w / (w + 1) - 1/2 of a shard's time. The interval (about 95 %) is made of how much single
shards differ from the mean, in speed and in tokens a byte, and its upper end of one more shard, the
longest of late, where there are several workers. Unknown until LEAST_SHARDS arrived. Sealing,
compaction and indexing come after it.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

WINDOW_S = 180.0
NOW_S = 60.0
WINDOW_SHARDS = 8
LEAST_SHARDS = 4
KEPT_SHARDS = 64
"""Arrivals kept of a worker: the window of a fast one is shorter."""


@dataclass(frozen=True)
class Eta:
    """Seconds until all is encoded, and an interval; `high` may be infinite."""

    value: float
    low: float
    high: float


@dataclass
class _Worker:
    """Marks of one worker: when it began, then each arrival with its tokens."""

    marks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=KEPT_SHARDS + 1))

    def recent(self, now: float, window_s: float, least: int = 1) -> _Recent:
        """Return what came within the window, and at least so many last arrivals."""
        marks = list(self.marks)
        first = max(1, len(marks) - least)
        while first > 1 and marks[first - 1][0] > now - window_s:
            first -= 1
        began, last = marks[first - 1][0], marks[-1][0]
        steps = [
            (tokens, at - before)
            for (before, _), (at, tokens) in zip(marks[first - 1 :], marks[first:], strict=False)
        ]
        gap = (last - began) / len(steps)
        took = max(last, now - 2 * gap) - began
        rate = sum(tokens for tokens, _ in steps) / max(took, 1e-9)
        return _Recent(steps, rate, gap, rate * min(now - last, gap))


@dataclass(frozen=True)
class _Recent:
    """What one worker did lately.

    Attributes:
        steps: (tokens, seconds) of each shard.
        rate: tokens a second.
        gap: mean seconds between arrivals.
        under_way: tokens done since the last arrival, at that rate.
    """

    steps: list[tuple[int, float]]
    rate: float
    gap: float
    under_way: float


class Pace:
    """Arrivals of one run; `left` is the size of what has not arrived."""

    def __init__(self, left: float) -> None:
        self._left = left
        self._workers: dict[str, _Worker] = {}
        # Sums over all shards, for the tokens that remain: of 1, t, s, tt, ts, ss.
        self._count = 0
        self._t = self._s = self._tt = self._ts = self._ss = 0.0

    def add(self, worker: str, at: float, *, tokens: int, size: float, worked_s: float) -> None:
        """Note a shard.

        Args:
            worker: who encoded it.
            at: seconds, on any clock that only goes forward.
            tokens: real tokens of it.
            size: its part of `left`.
            worked_s: how long the worker took for it, waiting left out.
        """
        marks = self._workers.setdefault(worker, _Worker()).marks
        if not marks:
            marks.append((at - worked_s, 0))
        marks.append((at, tokens))
        self._left = max(0.0, self._left - size)
        self._count += 1
        self._t, self._s = self._t + tokens, self._s + size
        self._tt, self._ts = self._tt + tokens**2, self._ts + tokens * size
        self._ss += size**2

    def tokens_per_s(self, now: float, window_s: float = NOW_S) -> float:
        """Return real tokens a second over all workers, lately."""
        return sum(w.recent(now, window_s).rate for w in self._workers.values())

    def of_worker(self, worker: str, now: float) -> float:
        """Return the tokens a second of one worker, lately."""
        return self._workers[worker].recent(now, NOW_S).rate

    def eta(self, now: float) -> Eta | None:
        """Return how long what is left will take by the rule above; None while unknown."""
        least = math.ceil(WINDOW_SHARDS / max(1, len(self._workers)))
        recent = [w.recent(now, WINDOW_S, least) for w in self._workers.values()]
        steps = [step for r in recent for step in r.steps]
        rate = sum(r.rate for r in recent)
        if not self._left:
            return Eta(0.0, 0.0, 0.0)
        if len(steps) < LEAST_SHARDS or not rate or not self._s:
            return None
        tokens = self._left * self._t / self._s
        at_work = min(float(len(recent)), max(1.0, self._left * self._count / self._s))
        share = at_work / len(recent)
        under_way = share * sum(r.under_way for r in recent)
        value = max(0.0, tokens - under_way) / (share * rate)
        gap = sum(r.gap for r in recent) / len(recent)
        off = (2 + 4 / (len(steps) - 1)) * self._spread(steps, tokens)
        low, high = value / (1 + off), value / (1 - off) if off < 1 else math.inf
        longest = max(seconds for _, seconds in steps) if at_work > 1 else 0.0
        return Eta(value + gap * (at_work / (at_work + 1) - 0.5), low, high + longest)

    def _spread(self, steps: list[tuple[int, float]], tokens: float) -> float:
        """Return the relative standard error of the time that `tokens` tokens will take."""
        count, done = len(steps), sum(t for t, _ in steps)
        pooled = done / max(sum(s for _, s in steps), 1e-9)
        speed = sum((t - pooled * s) ** 2 for t, s in steps) / (count - 1) / (done / count) ** 2
        each = self._t / self._s
        squares = max(0.0, self._tt - 2 * each * self._ts + each**2 * self._ss)
        length = squares / (self._count - 1) / (self._t / self._count) ** 2
        still = done / count / tokens  # 1 / shards that remain
        return math.sqrt(speed * (1 / count + still) + length * (1 / self._count + still))


def eta_facts(eta: Eta | None) -> dict[str, float | None] | None:
    """Return an ETA as JSON takes it: seconds; `high` is None where it has no bound."""
    if eta is None:
        return None
    high = None if math.isinf(eta.high) else round(eta.high, 1)
    return {"value": round(eta.value, 1), "low": round(eta.low, 1), "high": high}


def eta_text(eta: dict[str, float | None] | None) -> str:
    """Return an ETA from `eta_facts` in words: `12 min (10 min to 15 min)`."""
    if eta is None:
        return "unknown"
    value, low, high = (_span(eta[key]) for key in ("value", "low", "high"))
    return value if value == low == high else f"{value} ({low} to {high})"


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
