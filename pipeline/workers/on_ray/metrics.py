"""Counters of a run for Prometheus, on the metrics page that Ray keeps on each node.

The driver counts, as results arrive, so that a shard that ran twice counts once. Ray adds `ray_`
before each name, and `_total` after that of a counter. One run a process: after a second
`ray.init` Ray 2.60 reports what is counted from then on more than once.
"""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from pipeline.messages import ShardResult


class RunMetrics:
    """What one run has encoded, by table and worker.

    Args:
        uri: of the table, the tag `table` of all.
    """

    def __init__(self, uri: str) -> None:
        self._tags = {"table": uri}
        tags = ("table", "worker")
        self._counters = {
            name: Counter(f"kalm_encode_{name}", description, tags)
            for name, description in (
                ("shards", "Shards encoded."),
                ("passages", "Passages encoded."),
                ("rejected", "Rows rejected."),
                ("truncated", "Passages cut to max_length."),
                ("tokens", "Tokens encoded, without padding."),
                ("padded_tokens", "Tokens computed, padding included."),
            )
        }
        self._seconds = Counter(
            "kalm_encode_seconds", "Time of the workers by stage.", (*tags, "stage")
        )
        self._workers = Gauge("kalm_encode_workers", "Workers that are ready.", ("table",))

    def add(self, result: ShardResult) -> None:
        """Count a shard."""
        tags = {**self._tags, "worker": result.worker}
        counts = {
            "shards": 1,
            "passages": result.num_rows,
            "rejected": len(result.rejects),
            "truncated": result.num_truncated,
            "tokens": result.num_tokens,
            "padded_tokens": result.padded_tokens,
        }
        for name, count in counts.items():
            if count:  # Ray refuses to add nothing
                self._counters[name].inc(count, tags)
        for stage, seconds in result.seconds.items():
            if seconds > 0:
                self._seconds.inc(seconds, {**tags, "stage": stage})

    def set_workers(self, ready: int) -> None:
        """Note how many workers are ready."""
        self._workers.set(ready, self._tags)
