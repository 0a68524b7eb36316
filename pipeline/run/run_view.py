"""The run view: what a run says it is doing now, as `kalm status --watch` reads it.

It is one small JSON file beside the table. `progress` fills it and `run_files` writes it.
"""

from __future__ import annotations

import json
from typing import Any

from kalm_encoder.table.location import Location
from pipeline.table.side_files import RUN_VIEW, read_text

WRITE_EVERY_S = 3.0
"""Seconds between two writes of the run view, so that who watches is not far behind."""
SILENT_AFTER_S = 15.0
"""A run that has not written for this long has died, stands still, or cannot reach the store."""
ENCODING, FINISHING = "encoding", "finishing"
COMPLETE, STOPPED, FAILED = "complete", "stopped", "failed"
ENDED = (COMPLETE, STOPPED, FAILED)


def read_view(table: Location) -> dict[str, Any] | None:
    """Return what the last run of a table said last, or None where none ever did.

    Raises:
        OSError: The store cannot be read.
    """
    session = table.file_session()
    if not session.contains(RUN_VIEW):
        return None
    view: dict[str, Any] = json.loads(read_text(session, RUN_VIEW))
    return view


def describe(view: dict[str, Any]) -> str:
    """Return a run in one line: how far it is, how fast, and how long it will still take."""
    encoding = view["state"] == ENCODING
    reason = f": {view['reason']}" if view["reason"] else ""
    ended = "" if encoding else f"{view['state']}{reason}, "
    ends = f", ETA {eta_text(view['eta_s'])}" if encoding else ""
    return (
        f"{ended}{view['rows_done']:,} of {view['rows']:,} passages, "
        f"{view['shards_done']:,} of {view['shards']:,} shards, "
        f"{view['tokens_per_s_now']:,.0f} tokens/s ({view['tokens_per_s']:,.0f} overall), "
        f"{view['padding']:.1%} padding, {view['truncated']:,} truncated, "
        f"{view['rejected']:,} rejected, commits: {view['commits']:,}, "
        f"workers: {view['num_workers']:,}{ends}"
    )


def eta_text(eta_s: dict[str, float] | None) -> str:
    """Return an ETA in words, such as `12 min (10 min to 15 min)`."""
    if eta_s is None:
        return "unknown"
    value, low, high = (_span(eta_s[key]) for key in ("value", "low", "high"))
    return value if value == low == high else f"{value} ({low} to {high})"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
