"""Scores the candidates of a request with one version of the table. It knows nothing of HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from kalm_encoder import PassageStates, RerankResult
from kalm_encoder.errors import InputError
from kalm_encoder.rerank.results import OnMissing, at_places
from kalm_encoder.rerank.texts import TEXT, encode_texts, keys_of
from kalm_encoder.service.filters import check_filter
from kalm_encoder.service.live import Version
from kalm_encoder.service.metrics import MATCH_TEXTS
from kalm_encoder.service.requests import Document, Options


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
        candidates: Stored ids, or texts if the encoder is loaded or texts are matched. One may
            occur several times.
        options: Instructions, ratio, cascade, max_ms, filter and grouping.

    Returns:
        The place in the request and the result of each candidate that passes the filter, best first
        as `Reranker.rerank` orders them; and the number of prompt tokens. The id of a result begins
        with TEXT if the text of the request was scored, and not a stored passage.

    Raises:
        InputError: There are too many candidates, a filter that is not allowed, an impossible
            option, or a text that is neither matched nor encoded.
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
        passages=_encode(version, keys, options.on_missing),
        group_by=options.group_by,
        aggregate=options.aggregate,
        max_passages=options.max_passages,
    )
    num_scored = sum(result.ratio is not None for result in results)
    return at_places(results, keys), len(prompt.ids) * num_scored


def _keys(version: Version, candidates: Sequence[Document]) -> list[str]:
    """Return the id of each candidate that is stored or has no text, and a key for other texts.

    A text that the table holds has the id of its passage, if texts are matched.
    """
    named = [c.id for c in candidates if c.id is not None and c.text is not None]
    stored = version.table.known(named) if named else set()
    texts = [c.text for c in candidates if c.text is not None and c.id not in stored]
    found = {}
    if version.settings.match_text:
        found = version.table.ids_by_text(texts)
        num_found = sum(text in found for text in texts)
        MATCH_TEXTS.labels("yes").inc(num_found)
        MATCH_TEXTS.labels("no").inc(len(texts) - num_found)
    keys = keys_of(texts, found)
    return [
        c.id if c.id is not None and (c.text is None or c.id in stored) else keys[c.text or ""]
        for c in candidates
    ]


def _encode(
    version: Version, keys: Sequence[str], on_missing: OnMissing
) -> dict[str, PassageStates]:
    """Encode the texts among the candidates; return their states by key.

    Raises:
        InputError: There are texts, and the encoder is not loaded. If texts are matched, this is
            left to `on_missing`.
    """
    if version.encoder is not None:
        return encode_texts(keys, version.encoder.encode)
    texts = [key.removeprefix(TEXT) for key in dict.fromkeys(keys) if key.startswith(TEXT)]
    if texts and not (version.settings.match_text and on_missing != "error"):
        shown = ", ".join(repr(text[:40]) for text in texts[:3])
        raise InputError(
            f"{len(texts)} candidates are texts without stored states ({shown}): send "
            "document_ids, or start the server with --with-encoder"
        )
    return {}
