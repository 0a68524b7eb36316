"""What an evaluation found, as plain values: written as JSON, drawn by the report.

Metrics are those of ir-measures, by its names (`nDCG@10`, `RR@10`, `R@100`, `AP`), on the run files
that are written. Nothing here computes one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Difference:
    """A setting against the first one, paired by query.

    Attributes:
        mean: of setting minus first setting.
        low, high: 95 % bootstrap interval of the mean.
        p: two-sided p of a paired randomisation test.
        wins, losses: queries where it is higher and lower; the rest ties.
    """

    mean: float
    low: float
    high: float
    p: float
    wins: int
    losses: int


@dataclass(frozen=True)
class SettingResult:
    """One ranking of all queries and what it costs.

    Attributes:
        name: such as `bm25`, `r4`, `r4-int8`, `r32:20,4`, `r4+bm25`.
        kind: "first stage", "reranked", "cascade" or "fused".
        ratio: scored at, of the last stage; None for the first stage.
        store_dtype: of the states; None for the first stage.
        metrics: mean over queries by metric.
        intervals: 95 % bootstrap interval of each mean.
        differences: by metric; empty for the first setting.
        per_query: values by query id, then metric.
        bytes_per_passage: states read to score one candidate, on average; 0 for the first stage.
        bytes_per_token: the same a passage token.
        ms_per_query: rerank time of each query, in milliseconds, in the order of `queries`; empty
            where nothing was timed.
    """

    name: str
    kind: str
    ratio: int | None
    store_dtype: str | None
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    differences: dict[str, Difference]
    per_query: dict[str, dict[str, float]]
    bytes_per_passage: float = 0.0
    bytes_per_token: float = 0.0
    ms_per_query: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class ScoreSample:
    """P(yes) of the candidates of one setting, split by judgement, and how well it is calibrated.

    Attributes:
        setting: name of the setting.
        edges: of the bins of P(yes), 21 numbers from 0 to 1.
        relevant, other: candidates in each of the 20 bins: judged relevant, and all else.
        calibration: a (mean P(yes), share judged relevant, candidates) triple a non-empty bin.
        expected_calibration_error: mean gap between the two, weighted by candidates.
    """

    setting: str
    edges: list[float]
    relevant: list[int]
    other: list[int]
    calibration: list[tuple[float, float, int]]
    expected_calibration_error: float


@dataclass(frozen=True)
class Candidate:
    """A passage in an example: id, place (1 is best), beginning of its text, whether relevant."""

    id: str
    rank: int
    score: float
    text: str
    relevant: bool


@dataclass(frozen=True)
class Example:
    """A query that a setting helped or hurt most, with both rankings' first passages."""

    query_id: str
    query: str
    setting: str
    metric: str
    before: float
    after: float
    first_stage: list[Candidate]
    reranked: list[Candidate]


@dataclass(frozen=True)
class Evaluation:
    """One collection, one model, all settings.

    Attributes:
        collection: its name; the folder's last part.
        split: of the judgements.
        model: name of the checkpoint.
        fingerprint: of it.
        note: what the reader must know of the model, such as that it is the demo; may be empty.
        first_stage: what made the candidates, such as "BM25 (Lance full-text search), top 50".
        instruction: the task in the prompt.
        num_passages, num_tokens: of the corpus as encoded.
        queries: text by id, those that have judgements, in order.
        settings: the first is what the others are compared with.
        scores: of each reranked setting.
        helped, hurt: examples, largest change first, from the main reranked setting.
        warnings: what may make figures misleading: missing judgements, candidates without states.
    """

    collection: str
    split: str
    model: str
    fingerprint: str
    note: str
    first_stage: str
    instruction: str
    num_passages: int
    num_tokens: int
    queries: dict[str, str]
    settings: list[SettingResult]
    scores: list[ScoreSample]
    helped: list[Example]
    hurt: list[Example]
    warnings: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, dict[str, float]]:
        """Return the means alone: {"bm25": {"ndcg@10": 0.4, …}, …}."""
        return {
            setting.name: {name.lower(): value for name, value in setting.metrics.items()}
            for setting in self.settings
        }

    def write(self, file: Path) -> None:
        """Write all of it as JSON."""
        text = json.dumps(asdict(self), ensure_ascii=False, indent=1)
        file.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Evaluation:
        """Read what `write` wrote."""
        raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        raw["settings"] = [
            SettingResult(
                **{
                    **s,
                    "intervals": {k: (v[0], v[1]) for k, v in s["intervals"].items()},
                    "differences": {k: Difference(**v) for k, v in s["differences"].items()},
                }
            )
            for s in raw["settings"]
        ]
        raw["scores"] = [
            ScoreSample(**{**s, "calibration": [(a, b, n) for a, b, n in s["calibration"]]})
            for s in raw["scores"]
        ]
        for side in ("helped", "hurt"):
            raw[side] = [
                Example(
                    **{
                        **e,
                        "first_stage": [Candidate(**c) for c in e["first_stage"]],
                        "reranked": [Candidate(**c) for c in e["reranked"]],
                    }
                )
                for e in raw[side]
            ]
        return cls(**raw)
