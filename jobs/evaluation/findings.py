"""What may be said of an evaluation, in words: verdicts and headline sentences.

A gain or a loss is claimed only where the interval of the difference lies on one side of 0 and the
randomisation test agrees. All else is "not distinguishable", whatever the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jobs.evaluation.numerals import interval, p_value, signed, size, value
from jobs.evaluation.results import Difference, Evaluation, SettingResult

Verdict = Literal["better", "worse", "not distinguishable"]
PREFERRED_METRIC = "nDCG@10"
NAMED = 5
"""Settings a sentence lists before it says how many more there are."""


def verdict(difference: Difference) -> Verdict:
    """Return what a difference allows to say."""
    if difference.p < 0.05 and difference.low > 0:
        return "better"
    if difference.p < 0.05 and difference.high < 0:
        return "worse"
    return "not distinguishable"


def primary_metric(evaluation: Evaluation) -> str:
    """Return nDCG@10 where it was measured, else the first metric."""
    metrics = evaluation.settings[0].metrics
    return PREFERRED_METRIC if PREFERRED_METRIC in metrics else next(iter(metrics))


def main_setting(evaluation: Evaluation) -> SettingResult | None:
    """Return the setting that examples are shown of, else the first reranked one, else None."""
    others = evaluation.settings[1:]
    shown = {example.setting for example in (*evaluation.helped, *evaluation.hurt)}
    for wanted in (
        [s for s in others if s.name in shown],
        [s for s in others if s.kind == "reranked"],
        others,
    ):
        if wanted:
            return wanted[0]
    return None


def headline(evaluation: Evaluation) -> list[str]:
    """Return the sentences a reader takes away, the most important first."""
    metric, first = primary_metric(evaluation), evaluation.settings[0]
    others = evaluation.settings[1:]
    if not others:
        low, high = first.intervals[metric]
        reached = f"{first.name} reaches {metric} {value(first.metrics[metric])}"
        return [f"{reached} {interval(low, high)}.", "Nothing was compared with it."]
    groups: dict[Verdict, list[SettingResult]] = {
        "better": [],
        "not distinguishable": [],
        "worse": [],
    }
    for setting in sorted(others, key=lambda s: -s.differences[metric].mean):
        groups[verdict(setting.differences[metric])].append(setting)
    better, unclear, worse = groups.values()
    return [
        _lead(first, better, unclear, worse, metric),
        *_also("Also better", better[1:], metric),
        *_also(f"Not distinguishable from {first.name}", unclear, metric),
        *_also(f"Worse than {first.name}", worse, metric),
        *_cheapest(better),
    ]


def _lead(
    first: SettingResult,
    better: Sequence[SettingResult],
    unclear: Sequence[SettingResult],
    worse: Sequence[SettingResult],
    metric: str,
) -> str:
    start = value(first.metrics[metric])
    if better:
        best = better[0]
        change = f"from {start} to {value(best.metrics[metric])}"
        return f"{best.name} raises {metric} {change} ({_evidence(best.differences[metric])})."
    if not unclear:
        least = worse[0]
        return (
            f"{'Every setting is' if len(worse) > 1 else f'{least.name} is'} worse than "
            f"{first.name} on {metric} ({start}); "
            f"{f'{least.name} loses least' if len(worse) > 1 else 'the difference is'}: "
            f"{_evidence(least.differences[metric])}."
        )
    return (
        f"No gain over {first.name} can be shown on {metric} ({start}): "
        f"{unclear[0].name} comes nearest, {_evidence(unclear[0].differences[metric])}."
    )


def _evidence(difference: Difference) -> str:
    reach = interval(difference.low, difference.high)
    return f"{signed(difference.mean)} {reach}, p {p_value(difference.p)}"


def _also(start: str, settings: Sequence[SettingResult], metric: str) -> list[str]:
    """Return a sentence that lists settings with their differences; none for no settings."""
    if not settings:
        return []
    named = [f"{s.name} ({signed(s.differences[metric].mean)})" for s in settings[:NAMED]]
    if len(settings) > NAMED:
        named.append(f"{len(settings) - NAMED} more")
    return [f"{start}: {', '.join(named)}."]


def _cheapest(better: Sequence[SettingResult]) -> list[str]:
    """Return which of the better settings reads least, where that is not the best one."""
    measured = [s for s in better if s.bytes_per_token > 0]
    if len(measured) < 2:
        return []
    best, least = measured[0], min(measured, key=lambda s: s.bytes_per_token)
    if least.bytes_per_token >= best.bytes_per_token:
        return []
    return [
        f"Of the better ones {least.name} reads least: {size(least.bytes_per_token)} a passage "
        f"token, against {size(best.bytes_per_token)} of {best.name}."
    ]


def meanings(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return what settings are, alike ones together: (names, words)."""
    groups: dict[tuple[str, str | None], list[SettingResult]] = {}
    for setting in evaluation.settings:
        groups.setdefault((setting.kind, setting.store_dtype), []).append(setting)
    found = []
    for (kind, dtype), settings in groups.items():
        ratios = ", ".join(str(s.ratio) for s in settings)
        stored = f"over {ratios} tokens, stored as {dtype}"
        words = {
            "first stage": f"the first stage alone: {evaluation.first_stage}",
            "reranked": f"ordered by P(yes) alone, from states averaged {stored}",
            "cascade": "coarse to fine: each step, written ratio:kept, scores what the one before "
            f"it kept; the last from states averaged {stored}",
            "fused": "the order by P(yes) and that of the first stage made one; states averaged "
            f"{stored}",
        }
        found.append((", ".join(s.name for s in settings), words[kind]))
    return found
