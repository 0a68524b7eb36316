"""Metrics of a run file, by ir-measures. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import ir_measures

from kalm_encoder.errors import InputError

DEFAULT = ("nDCG@10", "RR@10", "R@100", "AP")


def per_query(
    judgements: Mapping[str, Mapping[str, int]], file: Path, names: Iterable[str] = DEFAULT
) -> dict[str, dict[str, float]]:
    """Return each metric of each judged query; 0 where the run ranks nothing for it.

    Args:
        judgements: relevance by query and passage.
        file: a TREC run.
        names: as ir-measures spells them.

    Returns:
        Values by query id, then metric, both in the order given.

    Raises:
        InputError: a name ir-measures does not know.
    """
    measures = {}
    for name in names:
        try:
            measures[ir_measures.parse_measure(name)] = name
        except (NameError, ValueError) as error:
            raise InputError(f"{name!r} is no metric of ir-measures: {error}") from error
    found: dict[str, dict[str, float]] = {q: dict.fromkeys(names, 0.0) for q in judgements}
    run = ir_measures.read_trec_run(str(file))  # type: ignore[no-untyped-call]
    judged = {query: dict(passages) for query, passages in judgements.items()}
    for value in ir_measures.iter_calc(list(measures), judged, run):
        found[value.query_id][measures[value.measure]] = float(value.value)
    return found
