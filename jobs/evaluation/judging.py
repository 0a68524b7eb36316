"""What rankings and their metrics say: intervals, differences, score distributions, examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from jobs.evaluation.collection import Collection
from jobs.evaluation.results import Candidate, Example, ScoreSample, Setting, SettingResult
from jobs.evaluation.statistics import bootstrap_interval, compare, score_sample
from kalm_encoder.table.reader import PassageTable

MAX_EXAMPLES = 6
"""Largest number of queries shown that were helped, and of those that were hurt."""
SHOWN_PASSAGES = 5
"""Number of passages shown of each ranking of an example."""

Values = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Metrics by setting, query id and name."""


@dataclass(frozen=True, kw_only=True)
class Ranking(Setting):
    """All queries ranked with one setting.

    Attributes:
        ranked: (id, score) pairs by query id, best first.
        margins: Margins by query id and passage id, where a decoder scored.
    """

    ranked: dict[str, list[tuple[str, float]]]
    margins: dict[str, dict[str, float]] = field(default_factory=dict)


def setting_results(rankings: Sequence[Ranking], values: Values) -> list[SettingResult]:
    """Return each setting with its means, intervals and differences from the first one."""
    columns = {
        setting: {
            metric: {query: found[metric] for query, found in per_query.items()}
            for metric in next(iter(per_query.values()))
        }
        for setting, per_query in values.items()
    }
    first = columns[rankings[0].name]
    results = []
    for ranking in rankings:
        column = columns[ranking.name]
        compared = column if ranking is not rankings[0] else {}
        results.append(
            SettingResult(
                **{f.name: getattr(ranking, f.name) for f in fields(Setting)},
                metrics={m: sum(c.values()) / len(c) for m, c in column.items()},
                intervals={m: bootstrap_interval(list(c.values())) for m, c in column.items()},
                differences={m: compare(first[m], c) for m, c in compared.items()},
                per_query={query: dict(found) for query, found in values[ranking.name].items()},
            )
        )
    return results


def ranking_scores(ranking: Ranking, collection: Collection) -> ScoreSample:
    """Return the distribution and calibration of the scores of a reranked setting."""
    pairs = [
        (score, collection.judgements[query].get(passage, 0) > 0)
        for query, results in ranking.ranked.items()
        for passage, score in results
    ]
    return score_sample(ranking.name, [s for s, _ in pairs], [r for _, r in pairs])


def examples(
    collection: Collection, table: PassageTable, rankings: Sequence[Ranking], values: Values
) -> tuple[list[Example], list[Example]]:
    """Return the queries that were helped most and those hurt most, by the first metric.

    The change is that from the first setting to the one a reader would use: the first fused one
    where there is one, else the first after the first stage.
    """
    first = rankings[0]
    main = next((r for r in rankings if r.kind == "fused"), rankings[min(1, len(rankings) - 1)])
    before, after = values[first.name], values[main.name]
    metric = next(iter(next(iter(before.values()))))
    changes = {q: after[q][metric] - before[q][metric] for q in collection.queries}
    order = sorted(changes, key=lambda q: (-changes[q], q))
    helped = [q for q in order[:MAX_EXAMPLES] if changes[q] > 0]
    hurt = [q for q in reversed(order[-MAX_EXAMPLES:]) if changes[q] < 0]
    shown = {
        passage
        for query in [*helped, *hurt]
        for ranking in (first, main)
        for passage, _ in ranking.ranked[query][:SHOWN_PASSAGES]
    }
    texts = table.texts(list(shown)) if shown else {}

    def candidates(ranking: Ranking, query: str) -> list[Candidate]:
        judged = collection.judgements[query]
        best = ranking.ranked[query][:SHOWN_PASSAGES]
        return [
            Candidate(i, rank, score, texts.get(i, ""), judged.get(i, 0) > 0)
            for rank, (i, score) in enumerate(best, start=1)
        ]

    def example(query: str) -> Example:
        return Example(
            query_id=query,
            query=collection.queries[query],
            setting=main.name,
            metric=metric,
            before=before[query][metric],
            after=after[query][metric],
            first_stage=candidates(first, query),
            reranked=candidates(main, query),
        )

    return [example(q) for q in helped], [example(q) for q in hurt]
