"""What a request asks of the version it leases: candidates in, scores out. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kalm_encoder import PassageStates, PassageTable
from kalm_encoder.errors import InputError
from kalm_encoder.service.filters import check_filter
from kalm_encoder.service.live import LiveTable, Version
from kalm_encoder.service.shapes import Document, Options


@dataclass(frozen=True, slots=True)
class Scored:
    """One candidate of a request: its place there, and what it got."""

    index: int
    id: str | None
    score: float
    margin: float
    ratio: int


class Engine:
    """Scores requests within the operator's limits.

    Args:
        live: lends the version that a request begins, and ends, on.
    """

    def __init__(self, live: LiveTable) -> None:
        self.live = live
        self.settings = live.settings

    @property
    def model_name(self) -> str:
        """Name of the live version's model."""
        with self.live.lease() as version:
            return version.model_name

    def check_count(self, count: int) -> None:
        """Refuse too many candidates.

        Raises:
            InputError: with the limit.
        """
        if count > (limit := self.settings.max_candidates):
            raise InputError(f"{count} candidates, at most {limit} in one request")

    def rerank(
        self, version: Version, query: str, candidates: Sequence[Document], options: Options
    ) -> tuple[list[Scored], int]:
        """Score the candidates of one query.

        Args:
            version: leased.
            query: raw text.
            candidates: stored ids, or texts where the encoder is loaded; one may repeat.
            options: instruction, ratio, cascade, max_ms and filter.

        Returns:
            One Scored a candidate, best first as `Reranker.rerank` orders them, without those that
            fail the filter; and the tokens of the prompts.

        Raises:
            InputError: too many candidates, a filter that is not allowed, an impossible option, a
                text without the encoder.
            MissingIdsError: ids without stored states and without a text.
        """
        self.check_count(len(candidates))
        keys = _keys(candidates)
        allowed = self._allowed(version.table, candidates, options.filter)
        prompt = version.decoder.prompt(query, options.instruction)
        results = version.reranker.rerank(
            prompt,
            [k for k in dict.fromkeys(keys) if allowed is None or k in allowed],
            ratio=options.ratio,
            cascade=options.cascade,
            max_ms=options.max_ms,
            passages=_encode(version, keys, candidates),
        )
        places: dict[str, list[int]] = {}
        for index, key in enumerate(keys):
            places.setdefault(key, []).append(index)
        scored = [
            Scored(index, candidates[index].id, r.score, r.margin, r.ratio)
            for r in results
            for index in places[r.id]
        ]
        return scored, len(prompt.ids) * len(results)

    def _allowed(
        self, table: PassageTable, candidates: Sequence[Document], predicate: str | None
    ) -> set[str] | None:
        """Return the ids that satisfy the filter; None where there is none."""
        if predicate is None:
            return None
        where = check_filter(predicate, self.settings.filter_columns)
        ids = [c.id for c in candidates if c.id is not None]
        if len(ids) < len(candidates) or any(c.text is not None for c in candidates):
            raise InputError("a filter applies to stored passages: give ids, not texts")
        return table.known(ids, where=where)


def _keys(candidates: Sequence[Document]) -> list[str]:
    """Return what to call each candidate: its id, or a name that no other one has."""
    taken = {candidate.id for candidate in candidates}
    keys = []
    for index, candidate in enumerate(candidates):
        key = f"document {index}" if candidate.id is None else candidate.id
        while candidate.id is None and key in taken:
            key += "'"
        keys.append(key)
    return keys


def _encode(
    version: Version, keys: Sequence[str], candidates: Sequence[Document]
) -> dict[str, PassageStates]:
    """Encode candidates that come as texts and are not stored; return them by key.

    Raises:
        InputError: there are some, and no encoder.
    """
    texts = {k: c.text for k, c in zip(keys, candidates, strict=True) if c.text is not None}
    named = [c.id for c in candidates if c.id is not None and c.text is not None]
    for stored in version.table.known(named) if named else ():
        del texts[stored]
    if not texts:
        return {}
    if version.encoder is None:
        shown = ", ".join(repr(text[:40]) for text in list(texts.values())[:3])
        raise InputError(
            f"{len(texts)} candidates are texts without stored states ({shown}): send "
            "document_ids, or start the server with --with-encoder"
        )
    encoder, ratio = version.encoder, version.table.spec.ratios[0]
    encoded = version.decoder.call(lambda: encoder.encode(list(texts.values()), ratio=ratio))
    return dict(zip(texts, encoded, strict=True))
