"""Scores the candidates of a request with one version of the table. It knows nothing of HTTP."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from kalm_encoder import PassageStates, RerankResult
from kalm_encoder.errors import InputError
from kalm_encoder.rerank.results import at_places
from kalm_encoder.service.filters import check_filter
from kalm_encoder.service.live import Version
from kalm_encoder.service.requests import Document, Options

TEXT = f"text {uuid.uuid4()} "
"""Beginning of the keys of candidates that are scored from the text that came with the request. It
is random, so that no id begins with it. The text follows, so that equal texts have one key."""


def check_count(version: Version, count: int) -> None:
    """Refuse a request with too many candidates.

    Raises:
        InputError: The message names the limit.
    """
    if count > (limit := version.settings.max_candidates):
        raise InputError(f"the request has {count} candidates, at most {limit} can be in one")


def score_candidates(
    version: Version, query: str, candidates: Sequence[Document], options: Options
) -> tuple[list[tuple[int, RerankResult]], int]:
    """Score the candidates of one query.

    Args:
        version: The version to score from.
        query: Raw text.
        candidates: Stored ids, or texts if the encoder is loaded. One may occur several times.
        options: Instructions, ratio, cascade, max_ms, filter and grouping.

    Returns:
        The place in the request and the result of each candidate that passes the filter, best first
        as `Reranker.rerank` orders them; and the number of prompt tokens. The id of a result begins
        with TEXT if the text of the request was scored, and not a stored passage.

    Raises:
        InputError: There are too many candidates, a filter that is not allowed, an impossible
            option, or a text without the encoder.
        MissingIdsError: There are ids without stored states and without a text, and on_missing is
            "error".
    """
    check_count(version, len(candidates))
    keys, where = _keys(version, candidates), None
    if options.filter is not None:
        where = check_filter(options.filter, version.settings.filter_columns)
        if any(candidate.text is not None for candidate in candidates):
            raise InputError("a filter applies to stored passages: give ids, not texts")
    if options.group_by is not None:
        if any(candidate.text is not None for candidate in candidates):
            raise InputError("documents are ranked by stored passages: give ids, not texts")
        check_count(version, len(version.table.members(keys, options.group_by)))
    prompt = version.decoder.prompt(query, options.instruction, options.system_instruction)
    results = version.reranker.rerank(
        prompt,
        keys,
        ratio=options.ratio,
        cascade=options.cascade,
        max_ms=options.max_ms,
        on_missing=options.on_missing,
        where=where,
        passages=_encode(version, keys),
        group_by=options.group_by,
        aggregate=options.aggregate,
        max_passages=options.max_passages,
    )
    num_scored = sum(result.ratio is not None for result in results)
    return at_places(results, keys), len(prompt.ids) * num_scored


def _keys(version: Version, candidates: Sequence[Document]) -> list[str]:
    """Return the id of each candidate that is stored or has no text, and a key for other texts."""
    named = [c.id for c in candidates if c.id is not None and c.text is not None]
    stored = version.table.known(named) if named else set()
    return [
        c.id if c.id is not None and (c.text is None or c.id in stored) else f"{TEXT}{c.text}"
        for c in candidates
    ]


def _encode(version: Version, keys: Sequence[str]) -> dict[str, PassageStates]:
    """Encode the texts among the candidates; return their states by key.

    Raises:
        InputError: There are texts, and the encoder is not loaded.
    """
    texts = {key: key.removeprefix(TEXT) for key in keys if key.startswith(TEXT)}
    if not texts:
        return {}
    if version.encoder is None:
        shown = ", ".join(repr(text[:40]) for text in list(texts.values())[:3])
        raise InputError(
            f"{len(texts)} candidates are texts without stored states ({shown}): send "
            "document_ids, or start the server with --with-encoder"
        )
    return dict(zip(texts, version.encoder.encode(list(texts.values())), strict=True))
