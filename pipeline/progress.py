"""What a run says while it works: a bar on a terminal, a line every so often in a log file."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass, field

from tqdm import tqdm

from pipeline.encode_shard import ShardResult

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Counts of one run.

    Attributes:
        total_rows: rows of the plan.
        before: rows that earlier runs had dealt with.
        log_every_s: seconds between log lines where stderr is no terminal.
    """

    total_rows: int
    before: int = 0
    log_every_s: float = 15.0
    rows: int = 0
    rejected: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    truncated: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._began = self._logged = time.monotonic()
        self._bar = tqdm(
            total=self.total_rows,
            initial=self.before,
            unit=" passages",
            disable=not sys.stderr.isatty(),
        )

    def add(self, result: ShardResult) -> None:
        """Count one encoded shard and show it."""
        self.rows += result.num_rows
        self.rejected += len(result.rejects)
        self.tokens += result.num_tokens
        self.padded_tokens += result.padded_tokens
        self.truncated += result.num_truncated
        for stage, spent in result.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
        self._bar.set_postfix_str(self._counts(), refresh=False)
        self._bar.update(result.num_rows + len(result.rejects))
        now = time.monotonic()
        if self._bar.disable and now - self._logged >= self.log_every_s:
            self._logged = now
            logger.info("%s", self.line())

    def line(self) -> str:
        """Return one log line: how far, how fast, how long still."""
        done = self.before + self.rows + self.rejected
        rate = (self.rows + self.rejected) / self.elapsed_s
        eta = f"{(self.total_rows - done) / rate:,.0f} s" if rate else "unknown"
        return f"{done:,} of {self.total_rows:,} passages, {self._counts()}, ETA {eta}"

    def close(self) -> None:
        """Leave the terminal clean."""
        self._bar.close()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run began to encode."""
        return max(time.monotonic() - self._began, 1e-9)

    @property
    def tokens_per_s(self) -> float:
        """Real tokens a second, over all workers."""
        return self.tokens / self.elapsed_s

    @property
    def padding(self) -> float:
        """Share of computed tokens that were padding."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0

    def _counts(self) -> str:
        return (
            f"{self.tokens_per_s:,.0f} tokens/s, {self.padding:.1%} padding, "
            f"{self.truncated:,} truncated, {self.rejected:,} rejected"
        )
