"""Counters of a run for Prometheus, on the metrics page that Ray keeps on each node.

The driver counts as results arrive, so that a shard that ran twice counts once. Ray adds `ray_`
before each name, and `_total` after the name of a counter. One process may do one run: after a
second `ray.init` Ray 2.60 reports what is counted from then on more than once.
"""

from __future__ import annotations

from collections.abc import Callable

from ray.util.metrics import Counter, Gauge

from pipeline.messages import ShardResult

COUNTS: dict[str, tuple[str, Callable[[ShardResult], int]]] = {
    "shards": ("Shards encoded.", lambda result: 1),
    "passages": ("Passages encoded.", lambda result: result.num_rows),
    "rejected": ("Rows rejected.", lambda result: len(result.rejects)),
    "truncated": ("Passages cut to max_length.", lambda result: result.num_truncated),
    "tokens": ("Tokens encoded, without padding.", lambda result: result.num_tokens),
    "padded_tokens": ("Tokens computed, padding included.", lambda result: result.padded_tokens),
}


class RunMetrics:
    """Counters of what one run has encoded, by table and worker.

    Args:
        uri: URI of the table, which becomes the tag `table` of all metrics.
    """

    def __init__(self, uri: str) -> None:
        self._tags = {"table": uri}
        tags = ("table", "worker")
        self._counters = {
            name: Counter(f"kalm_encode_{name}", description, tags)
            for name, (description, _) in COUNTS.items()
        }
        self._seconds = Counter(
            "kalm_encode_seconds", "Time of the workers by stage.", (*tags, "stage")
        )
        self._workers = Gauge("kalm_encode_workers", "Workers that are ready.", ("table",))

    def add(self, result: object) -> None:
        """Count a shard that was encoded; the results of other work are not counted."""
        if not isinstance(result, ShardResult) or result.compute_dtype is None:
            return
        tags = {**self._tags, "worker": result.worker}
        for name, (_, count) in COUNTS.items():
            if number := count(result):  # Ray refuses to add nothing
                self._counters[name].inc(number, tags)
        for stage, seconds in result.seconds.items():
            if seconds > 0:
                self._seconds.inc(seconds, {**tags, "stage": stage})

    def set_workers(self, ready: int) -> None:
        """Set the number of workers that are ready."""
        self._workers.set(ready, self._tags)
