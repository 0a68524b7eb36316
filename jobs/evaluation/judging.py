"""Judges rankings: intervals, differences, score distributions, examples and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jobs.evaluation.collection import Collection
from jobs.evaluation.rankings import Scores
from jobs.evaluation.results import Candidate, Example, ScoreSample, SettingResult
from jobs.evaluation.statistics import bootstrap_interval, compare, score_sample
from kalm_encoder.rerank.fusion import fuse
from kalm_encoder.table.reader import PassageTable

MAX_EXAMPLES = 6
"""Largest number of queries shown that were helped, and of those that were hurt."""
SHOWN_PASSAGES = 5
"""Number of passages shown of each ranking of an example."""


@dataclass(frozen=True)
class Ranking:
    """All queries ranked with one setting.

    Attributes:
        setting: The setting; it has metrics once the ranking is judged.
        ranked: Scores by query id and passage id, best first.
    """

    setting: SettingResult
    ranked: Scores


def fused_ranking(setting: SettingResult, first: Ranking, margins: Scores) -> Ranking:
    """Return a reranking added to the first stage; it costs what the reranking costs."""
    fused = {}
    for query, scores in first.ranked.items():
        total = fuse(scores, margins[query])
        fused[query] = dict(sorted(total.items(), key=lambda pair: (-pair[1], pair[0])))
    name = f"{setting.name}+{first.setting.name}"
    return Ranking(replace(setting, name=name, kind="fused"), fused)


def with_metrics(
    setting: SettingResult, per_query: dict[str, dict[str, float]], first: SettingResult | None
) -> SettingResult:
    """Return a setting with its means, intervals and differences from the first setting, if any."""
    metrics, intervals, differences = {}, {}, {}
    for metric in next(iter(per_query.values())):
        column = {query: found[metric] for query, found in per_query.items()}
        metrics[metric] = sum(column.values()) / len(column)
        intervals[metric] = bootstrap_interval(list(column.values()))
        if first is not None:
            before = {query: found[metric] for query, found in first.per_query.items()}
            differences[metric] = compare(before, column)
    return replace(
        setting,
        metrics=metrics,
        intervals=intervals,
        differences=differences,
        per_query=per_query,
    )


def ranking_scores(ranking: Ranking, collection: Collection) -> ScoreSample:
    """Return the distribution and calibration of the scores of a reranked setting."""
    scores, relevant = [], []
    for query, results in ranking.ranked.items():
        for passage, score in results.items():
            scores.append(score)
            relevant.append(collection.judgements[query].get(passage, 0) > 0)
    return score_sample(ranking.setting.name, scores, relevant)


def examples(
    collection: Collection, table: PassageTable, rankings: Sequence[Ranking]
) -> tuple[list[Example], list[Example]]:
    """Return the queries that were helped most and those hurt most, by the first metric.

    The change is that from the first setting to the one a reader would use: the first fused one
    where there is one, else the first after the first stage.
    """
    first = rankings[0]
    main = next((r for r in rankings if r.setting.kind == "fused"), rankings[1])
    before, after = first.setting.per_query, main.setting.per_query
    metric = next(iter(first.setting.metrics))
    changes = {q: after[q][metric] - before[q][metric] for q in collection.queries}
    order = sorted(changes, key=lambda q: (-changes[q], q))
    helped = [q for q in order[:MAX_EXAMPLES] if changes[q] > 0]
    hurt = [q for q in reversed(order[-MAX_EXAMPLES:]) if changes[q] < 0]

    def candidates(ranking: Ranking, query: str) -> list[Candidate]:
        best = list(ranking.ranked[query].items())[:SHOWN_PASSAGES]
        # A document that was split is shown by how it begins.
        shown = {i: f"{i}#0" if table.spec.split else i for i, _ in best}
        texts = table.texts(list(shown.values())) if best else {}
        judged = collection.judgements[query]
        return [
            Candidate(i, rank, score, texts.get(shown[i], ""), judged.get(i, 0) > 0)
            for rank, (i, score) in enumerate(best, start=1)
        ]

    def example(query: str) -> Example:
        return Example(
            query_id=query,
            query=collection.queries[query],
            setting=main.setting.name,
            metric=metric,
            before=before[query][metric],
            after=after[query][metric],
            first_stage=candidates(first, query),
            reranked=candidates(main, query),
        )

    return [example(q) for q in helped], [example(q) for q in hurt]


def gaps(
    found: Scores, first: Scores, relevant: set[str], stored: Mapping[str, object]
) -> list[str]:
    """Return what there is to tell of passages that are not stored: no ranking can find them."""
    told = []
    if missing := {i for scores in found.values() for i in scores if i not in stored}:
        shown = ", ".join(sorted(missing)[:5])
        told.append(f"{len(missing)} candidates are not in the corpus and were left out: {shown}")
    if empty := sum(not scores for scores in first.values()):
        told.append(f"{empty} queries have no candidates and count as 0")
    if gone := sorted(relevant - stored.keys()):
        shown = ", ".join(gone[:5])
        told.append(
            f"{len(gone)} of {len(relevant)} relevant passages are not in the corpus: {shown}"
        )
    return told
