"""Says what an evaluation allows to be said: verdicts, headline sentences and numerals.

A gain or a loss is claimed only where the interval of the difference lies on one side of 0 and the
randomisation test agrees. All else is "not distinguishable", whatever the mean. Numbers are printed
as `.475`, `+.047 [.020, .074]`, `p < .001` and `48.6 KB`.
"""

from __future__ import annotations

from typing import Literal, get_args

from jobs.evaluation.results import Difference, Evaluation, SettingResult

Verdict = Literal["better", "not distinguishable", "worse"]
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
    """Return the metric that settings are compared by: the first one."""
    return next(iter(evaluation.settings[0].metrics))


def main_setting(evaluation: Evaluation) -> SettingResult | None:
    """Return the setting of the examples, else the first reranked one, else any; None if alone."""
    shown = {example.setting for example in (*evaluation.helped, *evaluation.hurt)}
    return min(
        evaluation.settings[1:],
        key=lambda s: (s.name not in shown, s.kind != "reranked"),
        default=None,
    )


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
    best = (*better, *unclear, *worse)[0]
    told = [_lead(first, best, metric, num_compared=len(others))]
    for start, settings in (
        ("Also better", better[1:]),
        (f"Not distinguishable from {first.name}", unclear),
        (f"Worse than {first.name}", worse),
    ):
        named = [f"{s.name} ({signed(s.differences[metric].mean)})" for s in settings]
        if len(named) > NAMED:
            named[NAMED:] = [f"{len(named) - NAMED} more"]
        if named:
            told.append(f"{start}: {', '.join(named)}.")
    least = min(better, key=lambda s: s.bytes_per_token, default=first)
    if better and least.bytes_per_token < better[0].bytes_per_token:
        told.append(
            f"Among the better ones, {least.name} reads the least: {size(least.bytes_per_token)} "
            f"per passage token, against {size(better[0].bytes_per_token)} for {better[0].name}."
        )
    return told


def _lead(first: SettingResult, best: SettingResult, metric: str, *, num_compared: int) -> str:
    """Return what to say first: what the best of the settings that were compared reaches."""
    start = value(first.metrics[metric])
    d = best.differences[metric]
    evidence = f"{signed(d.mean)} {interval(d.low, d.high)}, p {p_value(d.p)}"
    if verdict(d) == "better":
        change = f"from {start} to {value(best.metrics[metric])}"
        return f"{best.name} raises {metric} {change} ({evidence})."
    if verdict(d) == "not distinguishable":
        return (
            f"No gain over {first.name} can be shown on {metric} ({start}): "
            f"{best.name} comes nearest, {evidence}."
        )
    against = f"worse than {first.name} on {metric} ({start})"
    if num_compared > 1:
        return f"Every setting is {against}; {best.name} loses least: {evidence}."
    return f"{best.name} is {against}; the difference is: {evidence}."


def meanings(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return what the settings are, those of one kind together: (names, words)."""
    dtype = next((s.store_dtype for s in evaluation.settings if s.store_dtype), None)
    stored = f"A name that ends in no type means {dtype}."
    kinds = {
        "first stage": f"the first stage alone: {evaluation.first_stage}",
        "reranked": "ordered by P(yes) alone, from states averaged over the number of tokens that "
        f"follows the r. {stored}",
        "cascade": "coarse to fine: each stage, written ratio:kept, scores what the one before it "
        f"kept. {stored}",
        "fused": "the scores of the reranking and of the first stage added up",
    }
    names = {kind: [s.name for s in evaluation.settings if s.kind == kind] for kind in kinds}
    return [(", ".join(names[kind]), words) for kind, words in kinds.items() if names[kind]]


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
