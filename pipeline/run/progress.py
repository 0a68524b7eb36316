"""Follows one run: notes each shard and commit, and tells of them while the run works.

A terminal shows a bar, anything else gets a log line now and then. The records and the run view go
to the files beside the table. All of it comes from the same totals.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Generator, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Self

from tqdm import tqdm

from kalm_encoder.errors import FencedError, first_line
from kalm_encoder.table.location import Location
from pipeline import logs
from pipeline.corpus.shards import Plan, Shard
from pipeline.messages import Outcome, ShardResult
from pipeline.run import run_files
from pipeline.run.records import RunTotals, ShardRecord
from pipeline.run.speed import WorkerSpeed, eta

logger = logging.getLogger(__name__)

LOG_EVERY_S = 15.0
"""Least number of seconds between two log lines about the progress of a run."""
MOST_WORKERS = 500
"""Workers in the run view, those seen last: this bounds a file that is written often."""


class Progress:
    """One run, from its first shard to its end: a context whose exit says how the run ended.

    Attributes:
        before: Number of rows that earlier runs have dealt with.
        totals: What this run has encoded.
        files: Where it is written.
    """

    def __init__(
        self,
        table: Location,
        plan: Plan,
        pending: Sequence[Shard],
        doing: str = run_files.ENCODING,
    ) -> None:
        self._plan, self._num_pending = plan, len(pending)
        self.before = plan.num_rows - sum(shard.rows.num_rows for shard in pending)
        self._rows_done = self.before
        # Bytes foretell the work better than rows do, but rows of columnar files have none.
        self._by_bytes = not any(shard.file.is_columnar for shard in pending)
        self._left = sum(map(self._size, pending))
        self.totals = RunTotals()
        self._workers: dict[str, WorkerSpeed] = {}
        self._uncommitted: dict[int, ShardRecord] = {}
        self._commits: list[dict[str, Any]] = []
        self._waited_s = 0.0  # for results, since the last commit
        self._doing = self._state = doing
        self._reason, self._lock = "", threading.Lock()
        self._began = self._logged = time.monotonic()
        self._began_at = datetime.now(UTC)
        self._run = logs.current().run
        self._step: dict[str, str | int] | None = None
        self._bar = tqdm(
            total=plan.num_rows,
            initial=self.before,
            unit=" passages",
            disable=not sys.stderr.isatty() or logs.current().format == logs.JSON,
        )
        self.files = run_files.RunFiles(table, self._run, self.view)

    def __enter__(self) -> Self:
        if self._num_pending:  # a run without work has nothing to tell: the view of the last stays
            self.files.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.files.stop()
        if self._state == self._doing:
            self.encoded()
        self._state = run_files.FAILED if error else run_files.COMPLETE
        if isinstance(error, KeyboardInterrupt):
            self._state = run_files.STOPPED
        elif error:
            self._reason = first_line(error)
        for shard in self._uncommitted.values():
            self.files.note(vars(shard))
        self.files.write_records()
        # Where another driver has taken the table over, the view is that driver's by now.
        if self._num_pending and not isinstance(error, FencedError):
            self.files.write_view()

    def received(self, outcomes: Iterable[Outcome]) -> Generator[Outcome]:
        """Yield what an executor yields; count its shards, and the time until they came."""
        asked_s = self._now_s()
        for outcome in outcomes:
            self._waited_s += self._now_s() - asked_s
            if isinstance(outcome, ShardResult):
                self._add(outcome)
            yield outcome
            asked_s = self._now_s()

    def committed(self, results: Sequence[ShardResult], seconds: float, version: int) -> None:
        """Note a commit that has just ended, and how long its shards waited for it.

        Args:
            results: The shards in the commit.
            seconds: Seconds that the commit took.
            version: Version of the table after the commit.
        """
        with self._lock:
            now_s = self._now_s()
            for result in results:
                shard = self._uncommitted.pop(result.shard.number, None)
                if shard is None:  # it was in a commit before, and is in the records once
                    continue
                waited_s = round(max(0.0, now_s - seconds - shard.at_s), 3)
                self.files.note({**vars(shard), "waited_s": waited_s})
            commit = {
                "kind": "commit",
                "run": self._run,
                "at_s": now_s,
                "shards": len(results),
                "rows": sum(result.num_rows for result in results),
                "seconds": round(seconds, 4),
                "version": version,
                "results_s": round(self._waited_s, 3),  # for results, since the commit before
            }
            self.files.note(commit)
            self._commits.append(commit)
            self._waited_s = 0.0

    def encoded(self) -> None:
        """Note that all shards are there; what follows is the table's time, not the workers'."""
        self.totals.seconds = self._now_s()
        self._state = run_files.FINISHING
        self._bar.close()

    def step(self, name: str, done: int, total: int) -> None:
        """Note how far a step after encoding is."""
        with self._lock:
            self._step = {"name": name, "parts": total, "parts_done": done}

    def view(self) -> dict[str, Any]:
        """Return the run view, as JSON takes it."""
        with self._lock:
            now_s, totals = self._now_s(), self.totals
            if self._state == self._doing:
                totals.seconds = now_s
            ends = eta(self._workers.values(), self._left, now_s)
            waited_s = self._waited_s + sum(commit["results_s"] for commit in self._commits)
            latest = sorted(self._workers, key=lambda name: self._workers[name].seen_at_s)
            return {
                "run": self._run,
                "doing": self._doing,
                "state": self._state,
                "reason": self._reason,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": self._began_at.isoformat(timespec="seconds"),
                "elapsed_s": round(totals.seconds, 1),
                "shards": len(self._plan.shards),
                "shards_done": len(self._plan.shards) - self._num_pending + totals.shards,
                "rows": self._plan.num_rows,
                "rows_done": self._rows_done,
                "tokens_per_s": round(totals.tokens_per_s, 1),
                "tokens_per_s_now": round(
                    sum(worker.tokens_per_s(now_s) for worker in self._workers.values()), 1
                ),
                "padding": round(totals.padding, 4),
                "truncated": totals.truncated,
                "rejected": totals.rejected,
                "commits": len(self._commits),
                "commit_s": round(sum(commit["seconds"] for commit in self._commits), 2),
                "results_s": round(waited_s, 2),
                "step": self._step,
                "eta_s": ends and {name: round(s, 1) for name, s in vars(ends).items()},
                "num_workers": len(self._workers),
                "workers": [
                    worker_view(name, self._workers[name], now_s)
                    for name in sorted(latest[-MOST_WORKERS:])
                ],
            }

    def _add(self, result: ShardResult) -> None:
        record = ShardRecord(
            run=self._run,
            at_s=self._now_s(),
            shard=result.shard.number,
            rows=result.num_rows,
            rejected=len(result.rejects),
            tokens=result.num_tokens,
            padded_tokens=result.padded_tokens,
            truncated=result.num_truncated,
            seconds={stage: round(spent, 4) for stage, spent in result.seconds.items()},
            worker=result.worker,
        )
        size = self._size(result.shard)
        with self._lock:
            self._uncommitted[record.shard] = record
            self._left -= size
            self._rows_done += result.shard.rows.num_rows  # of the input: a document is one
            self.totals.add(record)
            self.totals.seconds = record.at_s
            self._workers.setdefault(record.worker or "driver", WorkerSpeed()).add(record, size)
        if self._doing == run_files.ENCODING:
            self._bar.set_postfix_str(
                f"{self.totals.tokens_per_s:,.0f} tokens/s, {self.totals.padding:.1%} padding, "
                f"{self.totals.truncated:,} truncated, {self.totals.rejected:,} rejected",
                refresh=False,
            )
        self._bar.update(result.shard.rows.num_rows)
        if self._bar.disable and time.monotonic() - self._logged >= LOG_EVERY_S:
            self._logged = time.monotonic()
            logger.info("%s", run_files.describe(self.view()))

    def _size(self, shard: Shard) -> int:
        return shard.rows.length if self._by_bytes else shard.rows.num_rows

    def _now_s(self) -> float:
        return round(time.monotonic() - self._began, 3)


def worker_view(name: str, worker: WorkerSpeed, now_s: float) -> dict[str, Any]:
    """Return what the run view says of one worker."""
    return {
        "worker": name,
        "shards": worker.totals.shards,
        "tokens_per_s": round(worker.tokens_per_s(now_s), 1),
        "device_busy": round(worker.totals.device_busy, 3),
        "seconds": {stage: round(spent, 2) for stage, spent in worker.totals.stages.items()},
        "seen_s_ago": round(now_s - worker.seen_at_s, 1),
    }
