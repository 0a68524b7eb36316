"""Ids in, ranking out: take stored states, score them, sort. Joins table and decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kalm_encoder.decoder import QueryDecoder
from kalm_encoder.errors import InputError, MismatchError
from kalm_encoder.prompts import TEMPLATE
from kalm_encoder.rows import FORMAT_VERSION
from kalm_encoder.table import PassageTable


@dataclass(frozen=True, slots=True)
class RerankResult:
    """One candidate: score = P(yes) in [0, 1], margin = logit of yes minus logit of no."""

    id: str
    score: float
    margin: float


class Reranker:
    """A passage table and the decoder that belongs to it."""

    def __init__(
        self, table: PassageTable, decoder: QueryDecoder, *, max_length: int | None = None
    ) -> None:
        check_match(table, decoder, max_length=max_length)
        self.table = table
        self.decoder = decoder

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

        Raises:
            TableError: no such table, or not complete.
            CheckpointError: the model cannot be loaded.
            MismatchError: table and model do not belong together; names the field.
        """
        table = PassageTable.open(uri, version=version, storage_options=storage_options)
        if model is None:
            model, revision = table.spec.model, revision or table.spec.revision
        decoder = QueryDecoder.load(model, revision=revision, device=device, dtype=dtype)
        return cls(table, decoder, max_length=max_length)

    def rerank(
        self,
        query: str,
        ids: Sequence[str],
        *,
        instruction: str | None = None,
        ratio: int | None = None,
        top_k: int | None = None,
    ) -> list[RerankResult]:
        """Score stored passages against a query.

        Args:
            query: raw text.
            ids: candidates, in any order; a repeated one is scored once.
            instruction: the task; None takes the model's default.
            ratio: any multiple of a stored ratio; None takes the finest stored.
            top_k: keep the best k; None keeps all.

        Returns:
            Best first, ties by id. Scores are P(yes), never normalised over the candidates.

        Raises:
            MissingIdsError: names all ids the table does not hold.
            InputError: an impossible ratio or top_k.
        """
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k {top_k} must be at least 1")
        unique = list(dict.fromkeys(ids))
        passages = self.table.take(unique, ratio=ratio)
        scores = self.decoder.score(query, [p.states for p in passages], instruction=instruction)
        results = [RerankResult(i, *pair) for i, pair in zip(unique, scores, strict=True)]
        results.sort(key=lambda r: (-r.score, -r.margin, r.id))
        return results[:top_k]


def check_match(
    table: PassageTable, decoder: QueryDecoder, *, max_length: int | None = None
) -> None:
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
