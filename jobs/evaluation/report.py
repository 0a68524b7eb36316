"""An evaluation as one HTML file that needs nothing else: no network, no other file.

The template holds the words and their order, `findings` what may be claimed, the figure
modules the pictures. Texts come from corpora: the template escapes all of them, and the
page's policy lets no script run but its own, which only sorts tables. The file's size is bounded,
however many queries there are.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from jobs.evaluation import numerals
from jobs.evaluation.change_figure import MAX_BARS, change_figure
from jobs.evaluation.findings import headline, main_setting, meanings, primary_metric, verdict
from jobs.evaluation.results import Difference, Evaluation, SettingResult
from jobs.evaluation.score_figure import score_figure
from jobs.evaluation.tradeoff_figure import Point, tradeoff_figure

MAX_QUERIES = 300
"""Rows of the table of queries: those with the largest change."""
MAX_EXAMPLES = 10
"""Examples a side."""
MAX_TEXT = 700
"""Characters of a passage in an example; of a query in the table a third."""
WIDE, NARROW = "wide", "narrow"


@dataclass(frozen=True)
class Row:
    """A setting in the tables.

    Attributes:
        setting: itself.
        difference: in the primary metric; None for the first setting.
        verdict: on it; None for the first setting.
        strip: places of low, mean and high on a strip of 100 units with 0 in the middle.
        ms_median, ms_p95: None where nothing was timed.
    """

    setting: SettingResult
    difference: Difference | None
    verdict: str | None
    strip: tuple[float, float, float]
    ms_median: float | None
    ms_p95: float | None


@dataclass(frozen=True)
class QueryRow:
    """A query in the table of queries: one value a setting, and the change of the main one."""

    id: str
    text: str
    values: list[float]
    change: float


def write_report(evaluation: Evaluation, file: Path) -> None:
    """Write the report of an evaluation.

    Args:
        evaluation: with at least one setting.
        file: to write, UTF-8; one that exists is replaced.
    """
    file.write_text(render_report(evaluation), encoding="utf-8")


def render_report(evaluation: Evaluation) -> str:
    """Return the report of an evaluation as HTML; the same evaluation gives the same text."""
    metric, main = primary_metric(evaluation), main_setting(evaluation)
    script, differences = _package_text("report.js"), _differences(evaluation, main, metric)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "value": numerals.value,
        "signed": numerals.signed,
        "p": numerals.p_value,
        "count": numerals.count,
        "size": numerals.size,
        "ms": numerals.milliseconds,
        "verdict": verdict,
        "cut": _cut,
    }
    return environment.from_string(_package_text("report.html")).render(
        e=evaluation,
        metric=metric,
        first=evaluation.settings[0],
        main=main,
        headline=[_unbroken(sentence) for sentence in headline(evaluation)],
        meanings=meanings(evaluation),
        rows=_rows(evaluation, metric),
        tradeoffs=_tradeoffs(evaluation, metric),
        scores=[(s, score_figure(s, name=f"scores{n}")) for n, s in enumerate(evaluation.scores)],
        differences=differences,
        changes=_change_figures(differences, main, evaluation.settings[0], metric),
        queries=_query_rows(evaluation, differences, metric),
        sides=[("helped", evaluation.helped), ("hurt", evaluation.hurt)],
        scored={s.name: s.kind in ("reranked", "cascade") for s in evaluation.settings},
        max_bars=MAX_BARS,
        max_examples=MAX_EXAMPLES,
        max_text=MAX_TEXT,
        css=Markup(_package_text("report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _package_text(name: str) -> str:
    return files("jobs.evaluation").joinpath(name).read_text(encoding="utf-8")


def _cut(text: str, length: int) -> str:
    """Return the beginning of a text, with a mark where something is missing."""
    return text if len(text) <= length else text[:length].rstrip() + " …"


def _unbroken(sentence: str) -> str:
    """Return a sentence in which no line ends inside an interval or a p."""
    return re.sub(r"\[[^\]]*\]|p [=<] \.\d+", lambda m: m[0].replace(" ", "\u00a0"), sentence)


def _rows(evaluation: Evaluation, metric: str) -> list[Row]:
    found = [s.differences.get(metric) for s in evaluation.settings]
    reach = max((max(-d.low, d.high) for d in found if d), default=0.0) or 1.0
    rows = []
    for setting, difference in zip(evaluation.settings, found, strict=True):
        ends = (difference.low, difference.mean, difference.high) if difference else (0, 0, 0)
        low, mean, high = (50 + 48 * end / reach for end in ends)
        median, p95 = _quantiles(setting)
        said = verdict(difference) if difference else None
        rows.append(Row(setting, difference, said, (low, mean, high), median, p95))
    return rows


def _quantiles(setting: SettingResult) -> tuple[float, float] | tuple[None, None]:
    """Return median and 95th percentile of a setting's milliseconds a query."""
    if not setting.ms_per_query:
        return None, None
    median, p95 = np.percentile(setting.ms_per_query, [50, 95])
    return float(median), float(p95)


def _tradeoffs(evaluation: Evaluation, metric: str) -> list[tuple[str, dict[str, Markup]]]:
    """Return the figures of quality against each cost that was measured, in two widths."""
    costs = {
        "bytes": {s.name: s.bytes_per_token for s in evaluation.settings[1:]},
        "ms": {s.name: _quantiles(s)[0] or 0.0 for s in evaluation.settings[1:]},
    }
    labels = {"bytes": "bytes a passage token (log)", "ms": "median ms a query (log)"}
    first = _point(evaluation.settings[0], 0.0, metric)
    drawn = []
    for key, cost in costs.items():
        points = [_point(s, cost[s.name], metric) for s in evaluation.settings if cost.get(s.name)]
        if points:
            figures = {
                kind: tradeoff_figure(
                    points,
                    first,
                    name=f"{key}-{kind}",
                    metric=metric,
                    cost=labels[key],
                    width=width,
                )
                for kind, width in ((WIDE, 540), (NARROW, 350))
            }
            drawn.append((key, figures))
    return drawn


def _point(setting: SettingResult, cost: float, metric: str) -> Point:
    low, high = setting.intervals[metric]
    series = (setting.kind, setting.store_dtype or "")
    return Point(setting.name, series, cost, setting.metrics[metric], low, high)


def _differences(
    evaluation: Evaluation, main: SettingResult | None, metric: str
) -> dict[str, float]:
    """Return the change of each query in the main setting; empty if there is none."""
    if main is None:
        return {}
    before = evaluation.settings[0].per_query
    return {q: main.per_query[q][metric] - before[q][metric] for q in main.per_query}


def _change_figures(
    differences: dict[str, float], main: SettingResult | None, first: SettingResult, metric: str
) -> dict[str, Markup]:
    if main is None:
        return {}
    title = f"Change of {metric} from {first.name} to {main.name}, query by query"
    values = list(differences.values())
    return {
        kind: change_figure(values, name=f"changes-{kind}", title=title, width=width)
        for kind, width in ((WIDE, 760), (NARROW, 350))
    }


def _query_rows(
    evaluation: Evaluation, differences: dict[str, float], metric: str
) -> Sequence[QueryRow]:
    """Return the queries with the largest change, at most MAX_QUERIES."""
    ordered = sorted(evaluation.settings[0].per_query, key=lambda q: -abs(differences.get(q, 0)))
    return [
        QueryRow(
            id=query,
            text=evaluation.queries.get(query, ""),
            values=[s.per_query[query][metric] for s in evaluation.settings],
            change=differences.get(query, 0.0),
        )
        for query in ordered[:MAX_QUERIES]
    ]
