"""An evaluation as one HTML file that needs nothing else: no network, no other file.

The template holds the words and their order, `findings` what may be claimed, the figure modules the
pictures. Texts come from corpora: the template escapes all of them, and the page's policy lets no
script run but its own, which only sorts tables. The size of the file is bounded, however many
queries there are.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from jobs.evaluation import findings
from jobs.evaluation.figures import MAX_BARS, change_figure, score_figure
from jobs.evaluation.results import Evaluation
from jobs.evaluation.tradeoff_figure import tradeoff_figure

MAX_QUERIES = 300
"""Largest number of rows in the table of queries: those with the largest change."""
MAX_TEXT = 700
"""Characters shown of a passage in an example; a third of them of a query in the table."""


def write_report(evaluation: Evaluation, file: Path) -> None:
    """Write the report of an evaluation with at least one setting; a file there is replaced."""
    file.write_text(render_report(evaluation), encoding="utf-8")


def render_report(evaluation: Evaluation) -> str:
    """Return the report of an evaluation as HTML; the same evaluation gives the same text."""
    metric, main = findings.primary_metric(evaluation), findings.main_setting(evaluation)
    first, script = evaluation.settings[0], _package_text("report.js")
    changes = {
        query: values[metric] - first.per_query[query][metric]
        for query, values in (main.per_query if main else {}).items()
    }
    others = evaluation.settings[1:]
    differences = [s.differences[metric] for s in others]
    num_bytes = {s.name: s.bytes_per_token for s in others if s.bytes_per_token}
    medians_ms = {s.name: _percentile(s.ms_per_query, 50) for s in others if s.ms_per_query}
    costs = (
        ("bytes", "bytes per passage token (log)", num_bytes),
        ("ms", "median ms per query (log)", medians_ms),
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "value": findings.value,
        "signed": findings.signed,
        "p": findings.p_value,
        "count": findings.count,
        "size": findings.size,
        "ms": findings.milliseconds,
        "verdict": findings.verdict,
        "percentile": _percentile,
    }
    return environment.from_string(_package_text("report.html")).render(
        e=evaluation,
        metric=metric,
        first=first,
        main=main,
        headline=[_unbroken(sentence) for sentence in findings.headline(evaluation)],
        meanings=findings.meanings(evaluation),
        reach=max((max(-d.low, d.high) for d in differences), default=0.0) or 1.0,
        tradeoffs=[
            (key, partial(tradeoff_figure, evaluation.settings, cost, metric=metric, cost=label))
            for key, label, cost in costs
            if cost
        ],
        score_figure=score_figure,
        changes=changes,
        change_figure=partial(change_figure, list(changes.values())),
        queries=sorted(first.per_query, key=lambda q: -abs(changes.get(q, 0)))[:MAX_QUERIES],
        max_bars=MAX_BARS,
        max_text=MAX_TEXT,
        css=Markup(_package_text("report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _package_text(name: str) -> str:
    return files("jobs.evaluation").joinpath(name).read_text(encoding="utf-8")


def _unbroken(sentence: str) -> str:
    """Return a sentence in which no line ends inside an interval or a p."""
    return re.sub(r"\[[^\]]*\]|p [=<] \.\d+", lambda m: m[0].replace(" ", "\u00a0"), sentence)


def _percentile(values: list[float], rank: int) -> float:
    """Return a percentile; 0 where nothing was measured."""
    return float(np.percentile(values or [0.0], rank))
