"""The spans of a run and its shards.

The driver records the span of a shard from what its worker measured. A worker is ended without
notice, and spans of its own that it had not yet sent would be lost.
"""

from __future__ import annotations

import time

from kalm_encoder import tracing
from kalm_encoder.table.location import Location
from pipeline.corpus.shards import Plan
from pipeline.messages import Failure, Outcome, ShardResult

NS = 1_000_000_000


def trace_run(table: Location, plan: Plan, num_pending: int, doing: str) -> None:
    """Say in the span of the run what is to be done."""
    if (run := tracing.current()) is not None:
        run.set_attributes(
            {
                "kalm.table": table.uri,
                "kalm.doing": doing,
                "kalm.rows": plan.num_rows,
                "kalm.shards": len(plan.shards),
                "kalm.shards.pending": num_pending,
            }
        )


def trace_shard(outcome: Outcome) -> None:
    """Record a shard that came back, or was given up, as a child of the span of the run."""
    if (run := tracing.current()) is None or outcome is None:
        return
    now = time.time_ns()
    if isinstance(outcome, Failure):
        more: dict[str, str | int] = {
            "kalm.shard": outcome.unit.id,
            "kalm.attempts": outcome.attempts,
        }
        error = outcome.reason.partition(":")[0]  # the type; the rest may hold what a row holds
        tracing.record("shard", run, now, now, more, error=error)
    elif isinstance(outcome, ShardResult):
        took = sum(s for stage, s in outcome.seconds.items() if stage != "idle")
        began = now - int(took * NS) if outcome.began is None else int(outcome.began * NS)
        attributes: dict[str, str | int] = {
            "kalm.shard": outcome.shard.id,
            "kalm.worker": outcome.worker,
            "kalm.rows": outcome.num_rows,
            "kalm.rejects": len(outcome.rejects),
            "kalm.tokens": outcome.num_tokens,
        }
        stages = {f"kalm.seconds.{stage}": s for stage, s in outcome.seconds.items()}
        tracing.record("shard", run, began, began + int(took * NS), {**attributes, **stages})
