"""`kalm status --watch`: a run seen from beside, until it ends or falls silent."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kalm_encoder.errors import InputError, KalmError
from kalm_encoder.table.location import Location
from pipeline.run.run_files import ENCODING, ENDED, describe, read_view

APPEARS_WITHIN_S = 60.0
"""Time for which a table without a run view is watched: a run that plans has not written one."""
SILENT_AFTER_S = 15.0
"""A run that has not written for this long has died, stands still, or cannot reach the store."""
MOST_ROWS = 30
"""Workers shown on a terminal, so that the rest stays in sight."""


def watch(table: Location, *, interval_s: float, as_json: bool) -> None:
    """Show a run until it ends: a screen on a terminal, else one line per look.

    Raises:
        InputError: No run has written to this table, or the interval is not positive.
        KalmError: The run fell silent.
    """
    if interval_s <= 0:
        raise InputError(f"--interval {interval_s} must be more than 0 seconds")
    views = _views(table, interval_s)
    try:
        if sys.stdout.isatty() and not as_json:
            _redraw(views)
        else:
            for view in views:
                print(json.dumps(view) if as_json else line(view), flush=True)
    except KeyboardInterrupt:  # the run goes on, so this is no failure
        return


def _views(table: Location, interval_s: float) -> Iterator[dict[str, Any]]:
    """Yield the run view at each look, with `silent_s`, until the run has ended.

    Clocks of two machines differ, so this machine's clock judges whether a run is silent: by the
    time since `updated_at` last changed.
    """
    changed, updated_at = time.monotonic(), None
    while True:
        view = read_view(table)
        if view and view["updated_at"] != updated_at:
            changed, updated_at = time.monotonic(), view["updated_at"]
        waited_s = time.monotonic() - changed
        if view is None:
            if waited_s > APPEARS_WITHIN_S:
                raise InputError(
                    f"no run has written to {table} for {APPEARS_WITHIN_S:.0f} s: check the "
                    "address; a `kalm encode` that still cuts its corpus into shards writes nothing"
                )
        else:
            silent = view["state"] not in ENDED and waited_s > SILENT_AFTER_S
            age = datetime.now(UTC) - datetime.fromisoformat(view["updated_at"])
            silent_s = max(age.total_seconds(), waited_s)
            yield {**view, "silent_s": round(silent_s, 1) if silent else None}
            if silent:
                raise KalmError(
                    f"the run has written nothing for {silent_s:.0f} s: process {view['pid']} on "
                    f"{view['host']} died, hangs or cannot reach the store. If it is gone, run the "
                    "same command again to resume"
                )
            if view["state"] in ENDED:
                return
        time.sleep(interval_s)


def line(view: dict[str, Any]) -> str:
    """Return a run in one line, with the time of day in UTC."""
    return f"{view['updated_at'][11:19]} {describe(view)}"


def _redraw(views: Iterator[dict[str, Any]]) -> None:
    with Live(auto_refresh=False) as screen:
        for view in views:
            screen.update(screen_of(view), refresh=True)


def screen_of(view: dict[str, Any]) -> Group:
    """Return a run as a terminal shows it: the whole of it, then a row per worker."""
    elapsed_s = view["elapsed_s"]
    head = [
        f"{view['state']}  run {view['run']}  on {view['host']}:{view['pid']}",
        describe(view),
        f"driver: {elapsed_s:,.0f} s, {view['results_s'] / max(elapsed_s, 1e-9):.0%} of it waiting "
        f"for results, {view['commit_s']:,.1f} s in commits",
    ]
    shown = sorted(view["workers"], key=lambda w: w["seen_s_ago"])[:MOST_ROWS]
    stages = list(dict.fromkeys(stage for w in shown for stage in w["seconds"]))
    table = Table("worker", box=None, pad_edge=False)
    device = ("device",) if view["doing"] == ENCODING else ()
    for name in ("shards", "tokens/s", *device, *(f"{s} s" for s in stages), "seen"):
        table.add_column(name, justify="right")
    for w in sorted(shown, key=lambda w: w["worker"]):
        table.add_row(
            w["worker"], f"{w['shards']:,}", f"{w['tokens_per_s']:,.0f}",
            *(f"{w['device_busy']:.0%}" for _ in device),
            *(f"{w['seconds'].get(stage, 0.0):,.1f}" for stage in stages),
            f"{w['seen_s_ago']:.0f} s ago",
        )  # fmt: skip
    more = view["num_workers"] - len(shown)
    return Group(Text("\n".join(head)), table, Text(f"and {more:,} more" if more else ""))
