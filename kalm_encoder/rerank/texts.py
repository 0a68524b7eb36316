"""Ranks texts: those that a table holds by their stored states, the others by states made now."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from kalm_encoder.errors import MissingIdsError, MissingTextsError
from kalm_encoder.matryoshka import PassageStates
from kalm_encoder.rerank.results import RerankResult, TextResult
from kalm_encoder.table.reader import PassageTable

TEXT = f"text {uuid.uuid4()} "
"""Beginning of the keys of texts that are not stored. It is random, so that no id begins with it.
The text follows, so that equal texts have one key."""

Encode = Callable[[Sequence[str]], Sequence[PassageStates]]
"""Returns the states of texts at the finest ratio of a table, as `PassageEncoder.encode` does."""


def keys_of(texts: Iterable[str], stored: dict[str, str]) -> dict[str, str]:
    """Return the key of each text: the id of a stored passage that has it, or TEXT and the text."""
    return {text: stored.get(text, TEXT + text) for text in texts}


def encode_texts(keys: Iterable[str], encode: Encode) -> dict[str, PassageStates]:
    """Return the states of those keys that are texts, by key."""
    texts = {key: key.removeprefix(TEXT) for key in keys if key.startswith(TEXT)}
    return dict(zip(texts, encode(list(texts.values())), strict=True)) if texts else {}


@contextmanager
def naming_texts(uri: str) -> Iterator[None]:
    """Name missing texts, and not their keys.

    Raises:
        MissingTextsError: Instead of a MissingIdsError of keys that are texts.
    """
    try:
        yield
    except MissingIdsError as error:
        texts = [key.removeprefix(TEXT) for key in error.ids if key.startswith(TEXT)]
        if not texts:
            raise
        raise MissingTextsError(texts, uri) from None


def rank_texts(
    rank: Callable[..., Sequence[RerankResult]],
    table: PassageTable,
    texts: Sequence[str],
    encode: Encode | None,
) -> list[TextResult]:
    """Return one result per text, in the order of `Reranker.rerank`.

    Args:
        rank: Ranks passages by id; takes `passages` as `Reranker.rerank` does.
        table: The open table, which finds rows by their texts.
        texts: Raw texts.
        encode: Makes the states of texts that are not stored; None makes none.

    Raises:
        MissingTextsError: If texts are missing, nothing encodes them, and `rank` refuses them.
        InputError: If the table does not find rows by their texts.
    """
    keys = keys_of(texts, table.ids_by_text(texts))
    passages = {} if encode is None else encode_texts(keys.values(), encode)
    with naming_texts(table.uri):
        results = rank(list(keys.values()), passages=passages)
    named = {key: text for text, key in keys.items()}
    return [
        TextResult(named[r.id], r.score, r.margin, r.ratio, None if r.id.startswith(TEXT) else r.id)
        for r in results
    ]
