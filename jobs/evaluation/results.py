"""Holds what an evaluation found as plain values, which are written as JSON and drawn.

Metrics are those of ir-measures, by its names (`nDCG@10`, `RR@10`, `R@100`, `AP`), computed from
the TREC run files that are written. Nothing here computes one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from kalm_encoder.prompts import DEFAULT_SYSTEM_INSTRUCTION


@dataclass(frozen=True)
class Difference:
    """A setting against the first one, paired by query.

    Attributes:
        mean: Mean of setting minus first setting.
        low: Lower end of the 95 % bootstrap interval of the mean.
        high: Upper end of that interval.
        p: Two-sided p of a paired randomisation test.
        wins: Number of queries where the setting is higher.
        losses: Number of queries where it is lower; the rest ties.
    """

    mean: float
    low: float
    high: float
    p: float
    wins: int
    losses: int


@dataclass(frozen=True, kw_only=True)
class SettingResult:
    """One way to rank, what it costs, and how well it ranks.

    Attributes:
        name: Its name, such as `bm25`, `r4`, `r4-int8`, `r32:20,4`, `r4+bm25`.
        kind: "first stage", "reranked", "cascade" or "fused".
        ratio: Ratio of the last stage; None for the first stage.
        store_dtype: Type in which the states are stored; None for the first stage.
        bytes_per_passage: Mean bytes of states read to score one candidate; 0 for the first stage.
        bytes_per_token: The same bytes per passage token.
        ms_per_query: Milliseconds to rerank each query, in the order of `Evaluation.queries`; empty
            where nothing was timed.
        metrics: Mean over the queries by metric.
        intervals: 95 % bootstrap interval of each mean.
        differences: Difference from the first setting by metric; empty for the first setting.
        per_query: Values by query id, then metric.
    """

    name: str
    kind: str
    ratio: int | None = None
    store_dtype: str | None = None
    bytes_per_passage: float = 0.0
    bytes_per_token: float = 0.0
    ms_per_query: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    differences: dict[str, Difference] = field(default_factory=dict)
    per_query: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoreSample:
    """P(yes) of the candidates of one setting, split by judgement, and how well it is calibrated.

    Attributes:
        setting: Name of the setting.
        edges: Edges of the bins of P(yes): 21 numbers from 0 to 1.
        relevant: Number of candidates in each of the 20 bins that are judged relevant.
        other: Number of all other candidates in each bin.
        calibration: A triple (mean P(yes), share judged relevant, candidates) per non-empty bin.
        expected_calibration_error: Mean gap between the two, weighted by candidates.
    """

    setting: str
    edges: list[float]
    relevant: list[int]
    other: list[int]
    calibration: list[tuple[float, float, int]]
    expected_calibration_error: float


@dataclass(frozen=True)
class Candidate:
    """A passage in an example: id, rank (1 is best), beginning of its text, whether relevant."""

    id: str
    rank: int
    score: float
    text: str
    relevant: bool


@dataclass(frozen=True)
class Example:
    """A query that a setting helped or hurt most, with the first passages of both rankings."""

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
        collection: Name of the collection: the last part of its folder.
        split: Split of the judgements.
        model: Name of the checkpoint.
        fingerprint: Fingerprint of the checkpoint.
        note: What the reader must know of the model, such as that it is the demo; may be empty.
        first_stage: What found the candidates, such as "BM25 (Lance full-text search), top 50".
        instruction: The task in the prompt.
        num_passages: Number of encoded passages.
        num_tokens: Number of their tokens.
        queries: Text by id of the queries that have judgements, in the order of their file.
        settings: All settings. The first is what the others are compared with.
        scores: Scores of each reranked setting.
        helped: Queries that the main setting helped, largest change first.
        hurt: Queries that it hurt, largest change first.
        warnings: What may make figures misleading: missing judgements, candidates without states.
        system_instruction: What the prompt says before the task.
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
    system_instruction: str = DEFAULT_SYSTEM_INSTRUCTION

    def summary(self) -> dict[str, dict[str, float]]:
        """Return the means alone: {"bm25": {"ndcg@10": 0.4, …}, …}."""
        return {
            setting.name: {name.lower(): value for name, value in setting.metrics.items()}
            for setting in self.settings
        }

    def write(self, file: Path) -> None:
        """Write all of it as JSON."""
        file.write_bytes(TypeAdapter(Evaluation).dump_json(self, indent=1) + b"\n")
