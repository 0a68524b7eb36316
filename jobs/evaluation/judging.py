"""Rankings and their metrics to an Evaluation: intervals, differences, scores, examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jobs.evaluation.calibration import score_sample
from jobs.evaluation.collection import Collection
from jobs.evaluation.results import Candidate, Evaluation, Example, ScoreSample, SettingResult
from jobs.evaluation.statistics import bootstrap_interval, compare
from kalm_encoder.table.reader import PassageTable

EXAMPLES = 6
"""Queries shown that were helped, and as many that were hurt."""
SHOWN = 5
"""Passages shown of each ranking of an example."""

Values = Mapping[str, Mapping[str, float]]
"""By query id, then metric."""


@dataclass(frozen=True)
class Ranking:
    """All queries ranked with one setting.

    Attributes:
        name, kind, ratio, store_dtype, bytes_per_passage, bytes_per_token, ms_per_query: as in
            SettingResult.
        ranked: (id, score) by query id, best first.
        margins: by query id and passage id, where a decoder scored.
    """

    name: str
    kind: str
    ranked: dict[str, list[tuple[str, float]]]
    margins: dict[str, dict[str, float]] = field(default_factory=dict)
    ratio: int | None = None
    store_dtype: str | None = None
    bytes_per_passage: float = 0.0
    bytes_per_token: float = 0.0
    ms_per_query: list[float] = field(default_factory=list)


def evaluation_of(
    collection: Collection,
    table: PassageTable,
    rankings: Sequence[Ranking],
    values: Mapping[str, Values],
    *,
    first_stage: str,
    instruction: str,
    note: str,
    warnings: list[str],
) -> Evaluation:
    """Put an evaluation together.

    Args:
        collection: what was ranked.
        table: where the passages are.
        rankings: the first is what the others are compared with.
        values: metrics by setting, query and name.
        first_stage: as in Evaluation.
        instruction: as in Evaluation.
        note: as in Evaluation.
        warnings: as in Evaluation.
    """
    first = rankings[0]
    tokens = table.dataset.to_table(columns=["num_tokens"])["num_tokens"].to_numpy()
    # What a reader would use: the first setting fused, where there is one; else the first alone.
    main = next((r for r in rankings if r.kind == "fused"), rankings[min(1, len(rankings) - 1)])
    metric = next(iter(next(iter(values[first.name].values()))))
    changes = {
        q: values[main.name][q][metric] - values[first.name][q][metric] for q in collection.queries
    }
    order = sorted(changes, key=lambda q: (-changes[q], q))
    chosen = [q for q in order[:EXAMPLES] if changes[q] > 0]
    hurt = [q for q in reversed(order[-EXAMPLES:]) if changes[q] < 0]
    shown = {i for q in [*chosen, *hurt] for r in (first, main) for i, _ in r.ranked[q][:SHOWN]}
    texts = table.texts(list(shown)) if shown else {}

    def example(query: str) -> Example:
        before, after = (values[r.name][query][metric] for r in (first, main))
        judged = collection.judgements[query]
        lists = (_candidates(r.ranked[query], texts, judged) for r in (first, main))
        return Example(query, collection.queries[query], main.name, metric, before, after, *lists)

    return Evaluation(
        collection=collection.name,
        split=collection.split,
        model=table.spec.model.rstrip("/").rsplit("/", 1)[-1],
        fingerprint=table.spec.fingerprint,
        note=note,
        first_stage=first_stage,
        instruction=instruction,
        num_passages=len(tokens),
        num_tokens=int(tokens.sum()),
        queries=collection.queries,
        settings=[_setting(r, values, first.name) for r in rankings],
        scores=[_scores(r, collection) for r in rankings if r.kind == "reranked"],
        helped=[example(q) for q in chosen],
        hurt=[example(q) for q in hurt],
        warnings=warnings,
    )


def _setting(ranking: Ranking, values: Mapping[str, Values], first: str) -> SettingResult:
    per_query = values[ranking.name]
    names = list(next(iter(per_query.values())))
    columns = {n: {q: v[n] for q, v in per_query.items()} for n in names}
    differences = {}
    if ranking.name != first:
        for name in names:
            other = {q: v[name] for q, v in values[first].items()}
            differences[name] = compare(other, columns[name])
    return SettingResult(
        name=ranking.name,
        kind=ranking.kind,
        ratio=ranking.ratio,
        store_dtype=ranking.store_dtype,
        metrics={n: sum(c.values()) / len(c) for n, c in columns.items()},
        intervals={n: bootstrap_interval(list(c.values())) for n, c in columns.items()},
        differences=differences,
        per_query={q: dict(v) for q, v in per_query.items()},
        bytes_per_passage=ranking.bytes_per_passage,
        bytes_per_token=ranking.bytes_per_token,
        ms_per_query=ranking.ms_per_query,
    )


def _scores(ranking: Ranking, collection: Collection) -> ScoreSample:
    pairs = [
        (score, collection.judgements[query].get(passage, 0) > 0)
        for query, results in ranking.ranked.items()
        for passage, score in results
    ]
    return score_sample(ranking.name, [s for s, _ in pairs], [r for _, r in pairs])


def _candidates(
    results: Sequence[tuple[str, float]], texts: Mapping[str, str], judged: Mapping[str, int]
) -> list[Candidate]:
    return [
        Candidate(i, rank, score, texts.get(i, ""), judged.get(i, 0) > 0)
        for rank, (i, score) in enumerate(results[:SHOWN], start=1)
    ]
