"""Rankings as TREC run files: `qid Q0 docid rank score tag`.

Evaluation tools go by the scores and break ties by passage id, each in its own way; trec_eval keeps
scores in single precision. So scores are written strictly falling in float32: the file says the
order, whoever reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kalm_encoder.errors import InputError

Run = dict[str, dict[str, float]]
"""Scores by query id and passage id, best first."""


def write_run(file: Path, ranked: Mapping[str, Sequence[tuple[str, float]]], tag: str) -> None:
    """Write rankings, each (id, score) best first; equal or rising scores are lowered by one step.

    Raises:
        InputError: an id with white space, which the format cannot hold.
    """
    with file.open("w", encoding="utf-8") as lines:
        for query, results in ranked.items():
            last = np.float32(np.inf)
            for rank, (passage, score) in enumerate(results, start=1):
                if set(f"{query}{passage}") & set(" \t\r\n\v\f\u0085\u00a0\u2028\u2029"):
                    raise InputError(
                        f"{query!r} or {passage!r} holds white space: a TREC run cannot name it"
                    )
                last = min(np.float32(score), np.nextafter(last, np.float32(-np.inf)))
                lines.write(f"{query} Q0 {passage} {rank} {float(last)!r} {tag}\n")


def read_run(file: Path) -> tuple[Run, str]:
    """Read a run file.

    Returns:
        Scores by query and passage, best first, ties by id; and the tag of the first line.

    Raises:
        InputError: a line that is none of a run, or a passage that is there twice.
    """
    run: Run = {}
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
            if not math.isfinite(value):
                raise ValueError(score)
        except ValueError:
            raise InputError(
                f"{file} line {number}: expected qid Q0 docid rank score tag, the score finite, "
                f"found {line[:60]!r}"
            ) from None
        tag = tag or name
        scores = run.setdefault(query, {})
        if passage in scores:
            raise InputError(f"{file} line {number}: {passage} is there twice for query {query}")
        scores[passage] = value
    if not run:
        raise InputError(f"{file} ranks nothing: it has no line")
    ordered = {q: dict(sorted(s.items(), key=lambda p: (-p[1], p[0]))) for q, s in run.items()}
    return ordered, tag
