"""Rankings as TREC run files, `qid Q0 docid rank score tag`, and their metrics by ir-measures.

Evaluation tools go by the scores and break ties by passage id, each in its own way; trec_eval keeps
scores in single precision. So scores are written strictly falling in float32: the file says the
order, whoever reads it. No metric is computed here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import ir_measures
import numpy as np

from kalm_encoder.errors import InputError

DEFAULT_MEASURES = ("nDCG@10", "RR@10", "R@100", "AP")

Scores = dict[str, dict[str, float]]
"""Scores by query id and passage id, best first."""


def write_ranking(file: Path, ranked: Scores, tag: str) -> None:
    """Write scores by query, best first; equal or rising scores are lowered by a step.

    Raises:
        InputError: An id contains white space, which the format cannot hold.
    """
    with file.open("w", encoding="utf-8") as lines:
        for query, results in ranked.items():
            last = np.float32(np.inf)
            for rank, (passage, score) in enumerate(results.items(), start=1):
                if set(f"{query}{passage}") & set(" \t\r\n\v\f\u0085\u00a0\u2028\u2029"):
                    raise InputError(
                        f"{query!r} or {passage!r} holds white space: no TREC run file can name it"
                    )
                last = min(np.float32(score), np.nextafter(last, np.float32(-np.inf)))
                lines.write(f"{query} Q0 {passage} {rank} {float(last)!r} {tag}\n")


def read_ranking(file: Path) -> tuple[Scores, str]:
    """Read a TREC run file.

    Returns:
        Scores by query and passage, best first, ties by id; and the tag of the first line.

    Raises:
        InputError: The file cannot be read, has no line or a line that does not belong to a run
            file, or names a passage twice for a query.
    """
    found: Scores = {}
    tag = ""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            query, _, passage, _, score, name = line.split()
            value = float(score)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(
                f"{file} line {number}: expected qid Q0 docid rank score tag, the score finite, "
                f"found {line[:60]!r}"
            )
        tag = tag or name
        scores = found.setdefault(query, {})
        if passage in scores:
            raise InputError(f"{file} line {number}: {passage} is there twice for query {query}")
        scores[passage] = value
    if not found:
        raise InputError(f"{file} ranks nothing: it has no line")
    ordered = {q: dict(sorted(s.items(), key=lambda p: (-p[1], p[0]))) for q, s in found.items()}
    return ordered, tag


def metrics_per_query(
    judgements: Mapping[str, Mapping[str, int]],
    file: Path,
    measures: Iterable[str] = DEFAULT_MEASURES,
) -> dict[str, dict[str, float]]:
    """Return each metric of each judged query; 0 where the file ranks nothing for it.

    Args:
        judgements: Relevance by query and passage.
        file: TREC run file.
        measures: Names as ir-measures spells them.

    Returns:
        Values by query id, then metric, both in the order given.

    Raises:
        InputError: ir-measures does not know a name.
    """
    parsed = {}
    for name in measures:
        try:
            parsed[ir_measures.parse_measure(name)] = name
        except (NameError, ValueError) as error:
            raise InputError(f"{name!r} is no metric of ir-measures: {error}") from error
    found = {query: dict.fromkeys(parsed.values(), 0.0) for query in judgements}
    ranking = ir_measures.read_trec_run(str(file))  # type: ignore[no-untyped-call]
    judged = {query: dict(passages) for query, passages in judgements.items()}
    for value in ir_measures.iter_calc(list(parsed), judged, ranking):
        found[value.query_id][parsed[value.measure]] = float(value.value)
    return found
