"""A saved estimate against what was really encoded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kalm_encoder.errors import InputError, MismatchError
from pipeline.run.records import RunTotals

OTHER_CORPUS = 0.05
"""If the passages differ from the estimate by more than this share, it is of another corpus."""


@dataclass(frozen=True)
class Line:
    """One quantity, estimated and actual.

    Attributes:
        name: Name of the quantity.
        planned: Estimated value; None if the estimate does not know it.
        actual: Actual value; None if the table does not know it.
        interval: Interval of the estimate; None if it was exact.
    """

    name: str
    planned: float | None
    actual: float | None
    interval: tuple[float, float] | None = None

    @property
    def difference(self) -> float | None:
        """Difference of the actual value, relative to the estimate."""
        return self.actual / self.planned - 1 if self.planned and self.actual is not None else None

    @property
    def inside(self) -> bool | None:
        """Whether the actual value is in the interval; None without one."""
        if self.interval is None or self.actual is None:
            return None
        return self.interval[0] <= self.actual <= self.interval[1]


def read_plan(file: Path) -> dict[str, Any]:
    """Read what `kalm plan --out` saved.

    Raises:
        InputError: The file is not there, or it is something else.
    """
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the estimate {file}: {error}") from error
    if not isinstance(plan, dict) or "spec" not in plan or "tokens" not in plan:
        raise InputError(f"{file} is not a saved estimate: `kalm plan … --out {file}` makes one")
    return plan


def compare(plan: dict[str, Any], facts: dict[str, Any], runs: RunTotals) -> list[Line]:
    """Compare a saved estimate with a table.

    Args:
        plan: Saved estimate, from `read_plan`.
        facts: Facts of the table, as `kalm status --json` prints them.
        runs: Totals of the table's run records.

    Raises:
        MismatchError: They were made with different settings, so that comparing them means nothing.
    """
    spec = {**plan["spec"], "ratios": ",".join(map(str, plan["spec"]["ratios"]))}
    for field in ("ratios", "store_dtype", "max_length", "dim", "keep_text"):
        if spec[field] != facts[field]:
            raise MismatchError(
                field,
                f"the estimate was made with {field} {spec[field]}, the table with {facts[field]}: "
                "run `kalm plan` again with the table's settings",
            )
    lines = []
    for name in ("passages", "tokens", "truncated", "bytes"):
        value, low, high = (plan[name][key] for key in ("value", "low", "high"))
        lines.append(Line(name, value, facts[name], None if low == high else (low, high)))
    rate = plan["rate"]["tokens_per_s"] * plan["gpus"] if plan["rate"] else None
    hours = next((w["hours"] for w in plan["work"] if w["model"] == plan["model"]), None)
    seconds = hours["value"] * 3600 if hours else None
    lines.append(Line("tokens/s", rate, runs.tokens_per_s if runs.runs else None))
    lines.append(Line("seconds", seconds, runs.seconds if runs.runs else None))
    return lines


def hint(lines: list[Line], facts: dict[str, Any]) -> str | None:
    """Say what is behind large differences, if the passages tell it.

    Args:
        lines: Lines from `compare`.
        facts: Facts of the table.
    """
    if facts["shards_missing"]:
        return (
            f"the table is not complete ({facts['shards_missing']:,} of {facts['shards']:,} shards "
            "are missing), but the estimate is for all of it: compare again when it is complete"
        )
    line = next(line for line in lines if line.name == "passages")
    if line.difference is None or line.inside or abs(line.difference) < OTHER_CORPUS:
        return None
    return (
        f"the estimate is for {line.planned:,.0f} passages, the table was made from "
        f"{facts['rows_planned']:,} rows: it looks like the estimate of another corpus, or of one "
        "that has changed since. Run `kalm plan` again with the table's input (and its --limit)"
    )
