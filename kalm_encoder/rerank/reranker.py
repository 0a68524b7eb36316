"""Ids in, ranking out: take stored states, score them, sort. Joins table and decoder."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from kalm_encoder.errors import InputError, MismatchError
from kalm_encoder.matryoshka import PassageStates, coarsen
from kalm_encoder.model.decoder import QueryDecoder
from kalm_encoder.model.pairs import Pair, Prompt
from kalm_encoder.prompts import TEMPLATE
from kalm_encoder.rerank.cascade import Stage, plan_stages
from kalm_encoder.table.reader import PassageTable
from kalm_encoder.table.spec import FORMAT_VERSION

CHUNK = 128
"""Candidates read together, while the decoder works on those before."""
TIMED_CHUNK = 16
"""Candidates scored between two looks at the clock, where there is a time budget."""


@dataclass(frozen=True, slots=True)
class RerankResult:
    """One candidate.

    Attributes:
        id: of the passage.
        score: P(yes) in [0, 1].
        margin: logit of yes minus logit of no.
        ratio: of the states it was scored from; coarser than asked for where a cascade dropped it
            or the time ran out.
    """

    id: str
    score: float
    margin: float
    ratio: int


class Scorer(Protocol):
    """What a reranker needs of a decoder; see QueryDecoder."""

    @property
    def fingerprint(self) -> str:
        """Of the checkpoint."""

    @property
    def dim(self) -> int:
        """Width of the states."""

    def prompt(self, query: str, instruction: str | None = None) -> Prompt:
        """Return a query as the decoder reads it."""

    def recall(self, prompt: Prompt, key: Hashable) -> torch.Tensor | None:
        """Return what is kept of a passage."""

    def score_pairs(self, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
        """Return score and margin of each pair."""


class Reranker:
    """A passage table and the decoder that belongs to it."""

    def __init__(
        self, table: PassageTable, decoder: Scorer, *, max_length: int | None = None
    ) -> None:
        check_match(table, decoder, max_length=max_length)
        self.table = table
        self.decoder = decoder
        self._reader = ThreadPoolExecutor(4, thread_name_prefix="kalm-read")

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        model: str | None = None,
        revision: str | None = None,
        version: int | str | None = None,
        max_length: int | None = None,
        storage_options: dict[str, str] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        hot_bytes: int = 0,
        index_bytes: int = 0,
    ) -> Reranker:
        """Open a table and load the decoder for it; the encoder is never loaded.

        Args:
            uri: of the table.
            model: hub id or directory; None takes what the table records, and its revision.
            revision: hub revision of `model`.
            version: version number or tag of the table; None takes the tag `live`.
            max_length: passage length the caller relies on; None takes what the table records.
            storage_options: as Lance takes them.
            device: None takes the first GPU, else the CPU.
            dtype: None takes bfloat16 on GPU and float32 on CPU.
            hot_bytes: memory, on the device, for passages that come back with the same
                instruction: they are neither read again nor is the prompt's fixed part computed.
            index_bytes: memory for where each row of the table lies; see PassageTable.load_index.

        Raises:
            TableError: no such table, or not complete.
            CheckpointError: the model cannot be loaded.
            MismatchError: table and model do not belong together; names the field.
        """
        table = PassageTable.open(
            uri, version=version, storage_options=storage_options, index_bytes=index_bytes
        )
        if model is None:
            model, revision = table.spec.model, revision or table.spec.revision
        decoder = QueryDecoder.load(
            model, revision=revision, device=device, dtype=dtype, hot_bytes=hot_bytes
        )
        return cls(table, decoder, max_length=max_length)

    def rerank(
        self,
        query: str | Prompt,
        ids: Sequence[str],
        *,
        instruction: str | None = None,
        ratio: int | None = None,
        top_k: int | None = None,
        cascade: Sequence[Stage] | None = None,
        max_ms: float | None = None,
        passages: Mapping[str, PassageStates] | None = None,
    ) -> list[RerankResult]:
        """Score stored passages against a query.

        Args:
            query: raw text, or what the decoder's `prompt` made of it; then its instruction counts.
            ids: candidates, in any order; a repeated one is scored once.
            instruction: the task; None takes the model's default.
            ratio: any multiple of a stored ratio; None takes the finest stored.
            top_k: keep the best k; None keeps all.
            cascade: stages (ratio, how many of the best go on), coarse first, instead of `ratio`:
                [(32, 20), (4, None)] scores all at 32 and the best 20 again at 4.
            max_ms: time budget. All are scored at the coarsest stage, however long it takes; later
                stages score the best first and stop in time. Without a `cascade` that is a coarse
                stage (see `cascade.coarse_stage`), then `ratio`.
            passages: states at the finest stored ratio by id, just encoded: used instead of the
                table's.

        Returns:
            Those of the last stage first, each stage best first, ties by id. Scores are P(yes),
            never normalised over the candidates; scores of different ratios are not comparable.

        Raises:
            MissingIdsError: names all ids the table does not hold.
            InputError: an impossible ratio, top_k, cascade or max_ms.
        """
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k {top_k} must be at least 1")
        if max_ms is not None and max_ms <= 0:
            raise InputError(f"max_ms {max_ms} must be above 0")
        deadline = None if max_ms is None else time.monotonic() + max_ms / 1000
        stages = plan_stages(self.table.spec, ratio, cascade, timed=deadline is not None)
        prompt = self.decoder.prompt(query, instruction) if isinstance(query, str) else query
        left = list(dict.fromkeys(ids))
        ranked: list[RerankResult] = []
        for number, (stage_ratio, keep) in enumerate(stages):
            until = deadline if number else None  # the first stage scores all, come what may
            scored = self._score(prompt, left, stage_ratio, until, passages or {})
            scored.sort(key=lambda r: (-r.score, -r.margin, r.id))
            # What this stage did not reach keeps its place below, with the score it has.
            reached = {result.id for result in scored}
            ranked = [*scored, *(r for r in ranked if r.id not in reached)]
            left = [result.id for result in scored][:keep]
        return ranked[:top_k]

    def _score(
        self,
        prompt: Prompt,
        ids: Sequence[str],
        ratio: int,
        deadline: float | None,
        given: Mapping[str, PassageStates],
    ) -> list[RerankResult]:
        """Score candidates until the deadline; return those there was time for."""
        size = CHUNK if deadline is None else TIMED_CHUNK
        chunks = [ids[start : start + size] for start in range(0, len(ids), size)]
        results: list[RerankResult] = []
        took, began = 0.0, time.monotonic()
        for some, pairs in self._read_ahead(prompt, chunks, ratio, given):
            if deadline is not None and time.monotonic() + took > deadline:
                break
            scores = self.decoder.score_pairs(pairs)
            results += [RerankResult(i, *pair, ratio) for i, pair in zip(some, scores, strict=True)]
            took, began = time.monotonic() - began, time.monotonic()
        return results

    def _read_ahead(
        self,
        prompt: Prompt,
        chunks: Sequence[Sequence[str]],
        ratio: int,
        given: Mapping[str, PassageStates],
    ) -> Iterator[tuple[Sequence[str], list[Pair]]]:
        """Yield each chunk with its pairs; the next one is read while the caller has this one."""
        reads = (self._reader.submit(self._pairs, prompt, c, ratio, given) for c in chunks)
        ahead = next(reads, None)
        for chunk in chunks:
            assert ahead is not None  # one read a chunk
            pairs = ahead.result()
            ahead = next(reads, None)
            yield chunk, pairs

    def _pairs(
        self, prompt: Prompt, ids: Sequence[str], ratio: int, given: Mapping[str, PassageStates]
    ) -> list[Pair]:
        """Pair a prompt with passages: recalled, given, or read from the table."""
        keys = {i: (self.table.uri, self.table.version, ratio, i) for i in ids if i not in given}
        pairs = {}
        for i, key in keys.items():
            if (entry := self.decoder.recall(prompt, key)) is not None:
                pairs[i] = Pair(prompt, entry, key)
        unknown = [i for i in keys if i not in pairs]
        for i, passage in zip(unknown, self.table.take(unknown, ratio=ratio), strict=True):
            pairs[i] = Pair(prompt, passage.states, keys[i])
        finest = self.table.spec.ratios[0]
        for i in ids:
            if i in given:
                states = coarsen(given[i].states, given[i].num_tokens, finest, ratio)
                pairs[i] = Pair(prompt, states)
        return [pairs[i] for i in ids]


def check_match(table: PassageTable, decoder: Scorer, *, max_length: int | None = None) -> None:
    """Refuse a table that this decoder cannot score.

    Raises:
        MismatchError: names the first differing field, both values and the remedy.
    """
    spec = table.spec
    again = "encode the corpus again"
    expected = [
        ("format_version", spec.format_version, FORMAT_VERSION, again),
        ("template", spec.template, TEMPLATE, again),
        ("dim", spec.dim, decoder.dim, f"load {spec.model}, or {again}"),
        ("max_length", spec.max_length, max_length or spec.max_length, again),
        (
            "fingerprint",
            spec.fingerprint,
            decoder.fingerprint,
            f"load the model the table was made with ({spec.model}, revision "
            f"{spec.revision or 'local'}), or {again} with this one",
        ),
    ]
    for field, stored, wanted, remedy in expected:
        if stored != wanted:
            raise MismatchError(
                field, f"{table.uri} has {field} {stored!r}, the query side {wanted!r}: {remedy}"
            )
