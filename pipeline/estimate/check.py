"""A saved plan against what was really encoded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kalm_encoder.errors import InputError, MismatchError
from pipeline.run.records import RunTotals

OTHER_CORPUS = 0.05
"""Passages that differ from the plan by more than this, and lie outside of its interval."""


@dataclass(frozen=True)
class Line:
    """One quantity, planned and actual.

    Attributes:
        name: of the quantity.
        planned: None where the plan does not know it.
        actual: None where the table does not.
        interval: of a plan that was extrapolated.
    """

    name: str
    planned: float | None
    actual: float | None
    interval: tuple[float, float] | None = None

    @property
    def difference(self) -> float | None:
        """Actual less planned, relative to the plan."""
        if self.planned is None or self.actual is None:
            return None
        return self.actual / self.planned - 1 if self.planned else None

    @property
    def inside(self) -> bool | None:
        """Whether the actual number is in the interval; None without one."""
        if self.interval is None or self.actual is None:
            return None
        return self.interval[0] <= self.actual <= self.interval[1]


def read_plan(file: Path) -> dict[str, Any]:
    """Read what `kalm plan --out` saved.

    Raises:
        InputError: it is not there, or is something else.
    """
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the plan {file}: {error}") from error
    if not isinstance(plan, dict) or "spec" not in plan or "tokens" not in plan:
        raise InputError(f"{file} is no plan: save one with `kalm plan … --out {file}`")
    return plan


def compare(plan: dict[str, Any], facts: dict[str, Any], runs: RunTotals) -> list[Line]:
    """Set a plan against a table.

    Args:
        plan: from `read_plan`.
        facts: of the table, as `kalm status --json` prints them.
        runs: totals of its run records.

    Raises:
        MismatchError: they were made with other settings, so that comparing them means nothing.
    """
    spec = {**plan["spec"], "ratios": ",".join(map(str, plan["spec"]["ratios"]))}
    for field in ("ratios", "store_dtype", "max_length", "dim", "keep_text"):
        if spec[field] != facts[field]:
            raise MismatchError(
                field,
                f"the plan has {field} {spec[field]}, the table {facts[field]}: plan again with "
                "the table's settings",
            )
    lines = [_line(plan, facts, name) for name in ("passages", "tokens", "truncated", "bytes")]
    rate = plan["rate"]
    planned = rate["tokens_per_s"] * plan["gpus"] if rate else None
    lines.append(Line("tokens/s", planned, runs.tokens_per_s if runs.runs else None))
    hours = next((w["hours"] for w in plan["work"] if w["model"] == plan["model"]), None)
    seconds = hours["value"] * 3600 if hours else None
    lines.append(Line("seconds", seconds, runs.seconds if runs.runs else None))
    return lines


def hint(lines: list[Line], facts: dict[str, Any]) -> str | None:
    """Say what is behind large differences, where the passages tell; None where nothing does.

    Args:
        lines: from `compare`.
        facts: of the table.
    """
    if facts["shards_missing"]:
        return (
            f"the table is not complete ({facts['shards_missing']:,} of {facts['shards']:,} shards "
            "are missing), the plan is for all of it: compare again when it is"
        )
    line = next(line for line in lines if line.name == "passages")
    if line.difference is None or line.inside or abs(line.difference) < OTHER_CORPUS:
        return None
    return (
        f"the plan is for {line.planned:,.0f} passages, the table was made of "
        f"{facts['rows_planned']:,} rows: this looks like the plan of another corpus, or of one "
        "that has changed since. Plan again with the table's input (and its --limit)"
    )


def _line(plan: dict[str, Any], facts: dict[str, Any], name: str) -> Line:
    planned = plan[name]
    exact = planned["low"] == planned["high"]
    interval = None if exact else (planned["low"], planned["high"])
    return Line(name, planned["value"], facts[name], interval)
