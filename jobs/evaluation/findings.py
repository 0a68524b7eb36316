"""What may be said of an evaluation, in words and numbers: verdicts, headline sentences, numerals.

A gain or a loss is claimed only where the interval of the difference lies on one side of 0 and the
randomisation test agrees. All else is "not distinguishable", whatever the mean. Numbers are printed
as `.475`, `+.047 [.020, .074]`, `p < .001` and `48.6 KB`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from jobs.evaluation.results import Difference, Evaluation, SettingResult

Verdict = Literal["better", "not distinguishable", "worse"]
PREFERRED_METRIC = "nDCG@10"
NAMED = 5
"""Number of settings that a sentence lists before it says how many more there are."""
MINUS = "\N{MINUS SIGN}"


def verdict(difference: Difference) -> Verdict:
    """Return what a difference allows one to say."""
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
    """Return the setting of the examples, else the first reranked one, else any; None if alone."""
    others = evaluation.settings[1:]
    shown = {example.setting for example in (*evaluation.helped, *evaluation.hurt)}
    order = sorted(others, key=lambda s: (s.name not in shown, s.kind != "reranked"))
    return next(iter(order), None)


def headline(evaluation: Evaluation) -> list[str]:
    """Return the sentences a reader takes away, the most important first."""
    metric, first = primary_metric(evaluation), evaluation.settings[0]
    others = evaluation.settings[1:]
    if not others:
        low, high = first.intervals[metric]
        reached = f"{first.name} reaches {metric} {value(first.metrics[metric])}"
        return [f"{reached} {interval(low, high)}.", "Nothing was compared with it."]
    others = sorted(others, key=lambda s: -s.differences[metric].mean)
    better, unclear, worse = (
        [s for s in others if verdict(s.differences[metric]) == said] for said in get_args(Verdict)
    )
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
    best = (*better, *unclear, *worse)[0]
    evidence = _evidence(best.differences[metric])
    if better:
        change = f"from {start} to {value(best.metrics[metric])}"
        return f"{best.name} raises {metric} {change} ({evidence})."
    if unclear:
        return (
            f"No gain over {first.name} can be shown on {metric} ({start}): "
            f"{best.name} comes nearest, {evidence}."
        )
    against = f"worse than {first.name} on {metric} ({start})"
    if len(worse) > 1:
        return f"Every setting is {against}; {best.name} loses least: {evidence}."
    return f"{best.name} is {against}; the difference is: {evidence}."


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
    """Return which of the better settings reads the least, where that is not the best one."""
    measured = [s for s in better if s.bytes_per_token > 0]
    if len(measured) < 2:
        return []
    best, least = measured[0], min(measured, key=lambda s: s.bytes_per_token)
    if least.bytes_per_token >= best.bytes_per_token:
        return []
    return [
        f"Among the better ones, {least.name} reads the least: {size(least.bytes_per_token)} per "
        f"passage token, against {size(best.bytes_per_token)} for {best.name}."
    ]


def meanings(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return what the settings are, with similar ones together: (names, words)."""
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
            "cascade": "coarse to fine: each stage, written ratio:kept, scores what the one before "
            f"it kept; the last one scores states averaged {stored}",
            "fused": "the scores of the reranking and of the first stage added up; states averaged "
            f"{stored}",
        }
        found.append((", ".join(s.name for s in settings), words[kind]))
    return found


def value(number: float) -> str:
    """Return a metric with three places and no leading zero: .475, 1.000, -.011 with a minus."""
    text = f"{abs(number):.3f}"
    short = text[1:] if text.startswith("0") else text
    return MINUS + short if number < 0 and short != ".000" else short


def signed(number: float) -> str:
    """Return a difference with its sign: +.047; one that rounds to nothing has none: .000."""
    text = value(number)
    return text if text.startswith(MINUS) or text == ".000" else "+" + text


def interval(low: float, high: float) -> str:
    """Return an interval: [.020, .074]."""
    return f"[{value(low)}, {value(high)}]"


def p_value(p: float) -> str:
    """Return what follows the letter p: `= .002`, `< .001`."""
    return "< .001" if p < 0.001 else f"= {value(p)}"


def count(number: float) -> str:
    """Return a whole number with separators: 12,345."""
    return f"{number:,.0f}"


def size(num_bytes: float) -> str:
    """Return bytes in decimal units, as object stores bill them: 320 B, 48.6 KB, 1.2 MB."""
    for unit in ("B", "KB", "MB"):
        if num_bytes < 999.5:
            places = 0 if unit == "B" or num_bytes >= 99.95 else 1
            return f"{num_bytes:.{places}f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} GB"


def milliseconds(ms: float) -> str:
    """Return a duration in milliseconds without the unit: 8.4, 97, 1,990."""
    return f"{ms:.1f}" if ms < 9.95 else f"{ms:,.0f}"
