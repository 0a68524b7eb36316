"""`kalm status --watch`: a run seen from beside, until it ends or falls silent."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from kalm_encoder.errors import InputError, KalmError

if TYPE_CHECKING:
    from rich.console import RenderableType

APPEARS_WITHIN_S = 60.0
MOST_ROWS = 30
"""Workers shown on a terminal."""


def watch(
    uri: str, storage_options: dict[str, str] | None, *, interval_s: float, as_json: bool
) -> None:
    """Show a run until it ends; redraws on a terminal, a line each time elsewhere.

    Raises:
        InputError: no run of this table is heard of, or an interval that is none.
        KalmError: the run fell silent.
    """
    if interval_s <= 0:
        raise InputError(f"--interval {interval_s} must be more than 0 seconds")
    seen = _follow(uri, storage_options, interval_s)
    try:
        if as_json:
            for facts in seen:
                print(json.dumps(facts), flush=True)
        elif sys.stdout.isatty():
            _redraw(seen)
        else:
            for facts in seen:
                print(line(facts), flush=True)
    except KeyboardInterrupt:  # the run goes on, so this is no failure
        return


def _follow(
    uri: str, storage_options: dict[str, str] | None, interval_s: float
) -> Iterator[dict[str, Any]]:
    """Yield what the run says, with `silent_s`, until it has ended.

    Whether a run is silent is judged by this machine's clock, from when its `updated_at` last
    changed: clocks of two machines differ. Only a file that looks old at first is given less time.
    """
    from pipeline.run.live import ENDED, SILENT_AFTER_S, WRITE_EVERY_S, read_live

    began = changed = time.monotonic()
    before = None
    while True:
        facts = read_live(uri, storage_options)
        now = time.monotonic()
        if facts is None:
            if now - began > APPEARS_WITHIN_S:
                raise InputError(
                    f"no run has written to {uri} for {APPEARS_WITHIN_S:.0f} s: is this the table "
                    "of a `kalm encode` that is past its planning?"
                )
        else:
            age = (datetime.now(UTC) - datetime.fromisoformat(facts["updated_at"])).total_seconds()
            if before is None:
                changed = now - max(0.0, min(age, SILENT_AFTER_S - 2 * WRITE_EVERY_S))
            elif facts["updated_at"] != before:
                changed = now
            before = facts["updated_at"]
            silent = facts["state"] not in ENDED and now - changed > SILENT_AFTER_S
            yield {**facts, "silent_s": round(max(age, now - changed), 1) if silent else None}
            if silent:
                raise KalmError(
                    f"the run has not been heard of for {max(age, now - changed):.0f} s: process "
                    f"{facts['pid']} on {facts['host']} died, hangs or cannot reach the store. If "
                    "it is gone, run the same command again to resume"
                )
            if facts["state"] in ENDED:
                return
        time.sleep(interval_s)


def line(facts: dict[str, Any]) -> str:
    """Return a run in one line."""
    from pipeline.run.pace import eta_text

    time_of_day = facts["updated_at"][11:19]
    if facts["state"] != "encoding":
        reason = f": {facts['reason']}" if facts["reason"] else ""
        return f"{time_of_day} {facts['state']}{reason}, {_done(facts)}, {_speed(facts)}"
    return (
        f"{time_of_day} {_done(facts)}, {_speed(facts)}, {_counts(facts)}, "
        f"workers: {facts['num_workers']:,}, ETA {eta_text(facts['eta_s'])}"
    )


def _done(facts: dict[str, Any]) -> str:
    return (
        f"{facts['rows_done']:,} of {facts['rows']:,} passages, "
        f"{facts['shards_done']:,} of {facts['shards']:,} shards"
    )


def _speed(facts: dict[str, Any]) -> str:
    return f"{facts['tokens_per_s_now']:,.0f} tokens/s ({facts['tokens_per_s']:,.0f} overall)"


def _counts(facts: dict[str, Any]) -> str:
    return (
        f"{facts['padding']:.1%} padding, {facts['truncated']:,} truncated, "
        f"{facts['rejected']:,} rejected, commits: {facts['commits']:,}"
    )


def _redraw(seen: Iterator[dict[str, Any]]) -> None:
    from rich.live import Live

    with Live(auto_refresh=False) as screen:
        for facts in seen:
            screen.update(screen_of(facts), refresh=True)


def screen_of(facts: dict[str, Any]) -> RenderableType:
    """Return a run as it is drawn on a terminal: the whole of it, then its workers."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from pipeline.run.pace import eta_text

    elapsed = facts["elapsed_s"]
    head = [
        f"{facts['state']}  run {facts['run']}  on {facts['host']}:{facts['pid']}",
        f"{_done(facts)}, ETA {eta_text(facts['eta_s'])}",
        f"{_speed(facts)}, {_counts(facts)}",
        f"driver: {elapsed:,.0f} s, {facts['results_s'] / max(elapsed, 1e-9):.0%} of it waiting "
        f"for results, {facts['commit_s']:,.1f} s in commits",
    ]
    if facts["reason"]:
        head.append(facts["reason"])
    shown = sorted(facts["workers"], key=lambda w: w["seen_s_ago"])[:MOST_ROWS]
    stages = list(dict.fromkeys(stage for w in shown for stage in w["seconds"]))
    table = Table("worker", box=None, pad_edge=False)
    for name in ("shards", "tokens/s", "device", *(f"{s} s" for s in stages), "seen"):
        table.add_column(name, justify="right")
    for w in sorted(shown, key=lambda w: w["worker"]):
        table.add_row(
            w["worker"], f"{w['shards']:,}", f"{w['tokens_per_s']:,.0f}", f"{w['device_busy']:.0%}",
            *(f"{w['seconds'].get(stage, 0.0):,.1f}" for stage in stages),
            f"{w['seen_s_ago']:.0f} s ago",
        )  # fmt: skip
    more = facts["num_workers"] - len(shown)
    return Group(Text("\n".join(head)), table, Text(f"and {more:,} more" if more else ""))
