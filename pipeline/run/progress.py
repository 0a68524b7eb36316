"""What is told about a run while it works: a bar or log lines, its records, its live view."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Generator, Iterable, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tqdm import tqdm

from kalm_encoder.errors import FencedError, first_line
from pipeline import logs
from pipeline.corpus.inputs import is_columnar
from pipeline.corpus.shards import Plan, Shard
from pipeline.messages import ShardResult
from pipeline.run import live
from pipeline.run.live import LiveFile
from pipeline.run.pace import Pace, eta_facts, eta_text
from pipeline.run.records import RunRecorder
from pipeline.run.run_totals import Work

if TYPE_CHECKING:
    from pipeline.messages import Outcome

logger = logging.getLogger(__name__)

LOG_EVERY_S = 15.0
MOST_WORKERS = 500
"""Workers in the live view: those that were seen last."""


class Progress:
    """One run, from its first shard to its end: a context whose exit says how it ended.

    Attributes:
        pending: shards to encode.
        before: rows that earlier runs had dealt with.
        work: what this run has encoded.
        recorder: of its records.
    """

    def __init__(
        self,
        uri: str,
        plan: Plan,
        pending: Sequence[Shard],
        storage_options: dict[str, str] | None = None,
    ) -> None:
        self._plan = plan
        self.pending = pending
        self.before = plan.num_rows - sum(shard.rows.num_rows for shard in pending)
        self.work = Work()
        self.recorder = RunRecorder(uri, logs.current().run, storage_options)
        self._workers: dict[str, Work] = {}
        self._seen_at: dict[str, float] = {}
        self._shards_before = len(plan.shards) - len(pending)
        self._by_bytes = not any(is_columnar(shard.path) for shard in pending)
        self._pace = Pace(sum(map(self._size, pending)))
        self._commits, self._commit_s, self._results_s, self._waited = 0, 0.0, 0.0, 0.0
        self._state, self._reason, self._lock = live.ENCODING, "", threading.Lock()
        self._began = self._logged = time.monotonic()
        self._ended: float | None = None  # of the encoding; what follows is the table's
        self._began_at = datetime.now(UTC).isoformat(timespec="seconds")
        self._bar = tqdm(
            total=plan.num_rows,
            initial=self.before,
            unit=" passages",
            disable=not sys.stderr.isatty() or logs.current().format == logs.JSON,
        )
        self._live = LiveFile(uri, self.look, storage_options) if pending else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _t: TracebackType | None,
    ) -> None:
        if isinstance(error, FencedError) and self._live:
            self._live.close(last_words=False)  # another driver speaks there now
            self._live = None
        if self._state == live.ENCODING:
            self.encoded()
        self._state = live.FAILED if error else live.COMPLETE
        if isinstance(error, KeyboardInterrupt):
            self._state = live.STOPPED
        elif error:
            self._reason = first_line(error)
        if self._live:
            self._live.close()

    def received(self, outcomes: Iterable[Outcome]) -> Generator[Outcome]:
        """Yield what an executor yields; count its shards, and the time until they came."""
        asked = time.monotonic()
        for outcome in outcomes:
            self._waited += time.monotonic() - asked
            if isinstance(outcome, ShardResult):
                self._add(outcome)
            yield outcome
            asked = time.monotonic()

    def committed(self, results: Sequence[ShardResult], seconds: float, version: int) -> None:
        """Note a commit that has just ended."""
        with self._lock:
            self.recorder.add_commit(
                results, seconds=seconds, version=version, results_s=self._waited
            )
            self._commits, self._commit_s = self._commits + 1, self._commit_s + seconds
            self._results_s, self._waited = self._results_s + self._waited, 0.0
        self.recorder.write_if_due()

    def encoded(self) -> None:
        """All shards are there: leave the terminal clean, write the records."""
        self._state = live.FINISHING
        self._ended = time.monotonic()
        self.work.seconds = self.elapsed_s
        self._bar.close()
        self.recorder.close()

    def _add(self, result: ShardResult) -> None:
        with self._lock:
            record = self.recorder.add(result)
            now = time.monotonic()
            self.work.add(record)
            name = record.worker or "driver"
            worked_s = record.worked_s or now - self._began
            if name not in self._workers:
                self._workers[name] = Work()
            self._pace.add(
                name, now, tokens=record.tokens, size=self._size(result.shard), worked_s=worked_s
            )
            worker = self._workers[name]
            worker.add(record)
            worker.seconds += now - self._seen_at.get(name, now - worked_s)
            self._seen_at[name] = now
        self._bar.set_postfix_str(self._counts(), refresh=False)
        self._bar.update(record.rows + record.rejected)
        if self._bar.disable and now - self._logged >= LOG_EVERY_S:
            self._logged = now
            logger.info("%s", self.line())

    def line(self) -> str:
        """Return one log line: how far, how fast, how long still."""
        done = self.before + self.work.rows + self.work.rejected
        eta = eta_text(eta_facts(self._pace.eta(time.monotonic())))
        return f"{done:,} of {self._plan.num_rows:,} passages, {self._counts()}, ETA {eta}"

    def look(self) -> dict[str, Any]:
        """Return what the live view shows, as JSON takes it."""
        with self._lock:
            now = time.monotonic()
            work = self.work
            work.seconds = self.elapsed_s
            latest = sorted(self._workers, key=self._seen_at.__getitem__)[-MOST_WORKERS:]
            return {
                "run": self.recorder.run,
                "state": self._state,
                "reason": self._reason,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": self._began_at,
                "elapsed_s": round(work.seconds, 1),
                "shards": len(self._plan.shards),
                "shards_done": self._shards_before + work.shards,
                "rows": self._plan.num_rows,
                "rows_done": self.before + work.rows + work.rejected,
                "tokens_per_s": round(work.tokens_per_s, 1),
                "tokens_per_s_now": round(self._pace.tokens_per_s(now), 1),
                "padding": round(work.padding, 4),
                "truncated": work.truncated,
                "rejected": work.rejected,
                "commits": self._commits,
                "commit_s": round(self._commit_s, 2),
                "results_s": round(self._results_s + self._waited, 2),
                "eta_s": eta_facts(self._pace.eta(now)),
                "num_workers": len(self._workers),
                "workers": [self._look_at(name, now) for name in sorted(latest)],
            }

    def _look_at(self, name: str, now: float) -> dict[str, Any]:
        work = self._workers[name]
        return {
            "worker": name,
            "shards": work.shards,
            "tokens_per_s": round(self._pace.of_worker(name, now), 1),
            "device_busy": round(work.device_busy, 3),
            "seconds": {stage: round(spent, 2) for stage, spent in work.stages.items()},
            "seen_s_ago": round(now - self._seen_at[name], 1),
        }

    def _size(self, shard: Shard) -> int:
        return shard.rows.length if self._by_bytes else shard.rows.num_rows

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run began to encode, until it had."""
        return max((self._ended or time.monotonic()) - self._began, 1e-9)

    def _counts(self) -> str:
        self.work.seconds = self.elapsed_s
        return (
            f"{self.work.tokens_per_s:,.0f} tokens/s, {self.work.padding:.1%} padding, "
            f"{self.work.truncated:,} truncated, {self.work.rejected:,} rejected"
        )
