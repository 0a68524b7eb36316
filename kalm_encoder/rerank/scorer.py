"""What a reranker needs of a decoder, and whether that decoder belongs to a table."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import torch

from kalm_encoder.errors import MismatchError
from kalm_encoder.model.pairs import Pair, Prompt
from kalm_encoder.prompts import TEMPLATE
from kalm_encoder.table.reader import PassageTable
from kalm_encoder.table.spec import FORMAT_VERSION


class Scorer(Protocol):
    """What a reranker needs of a decoder; see QueryDecoder, which is one."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the checkpoint."""

    @property
    def dim(self) -> int:
        """Width of the states."""

    def prompt(self, query: str, instruction: str | None = None) -> Prompt:
        """Return a query as the decoder reads it."""

    def recall(self, prompt: Prompt, key: Hashable) -> torch.Tensor | None:
        """Return what is kept of a passage, or None."""

    def score_pairs(self, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
        """Return the score and the margin of each pair."""


def check_match(table: PassageTable, decoder: Scorer, *, max_length: int | None = None) -> None:
    """Refuse a table that this decoder cannot score.

    Raises:
        MismatchError: If they differ; it names the first field, both values and the remedy.
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
