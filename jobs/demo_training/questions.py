"""Queries out of documentation, without a person: what is taken out of a text is asked of the rest.

Three kinds: `name` asks with the qualified name's words for the text without title; `summary` with
the first sentence, and `sentence` with a later one, for the text without it. In a collection every
passage is treated the way its kind treats a question's passage, so that nothing but content tells
the right one from the others.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from jobs.demo_training.documentation import Document

KINDS = ("name", "summary", "sentence")
MIN_WORDS, MAX_WORDS = 4, 30
"""Of a sentence that may be a query."""
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
OPENINGS = ("how do i ", "how to ", "how can i ", "what is the way to ", "i want to ")
ASKED_IN_WORDS = 0.3
"""Share of summaries that are put as a person would: "how do I return …"."""


@dataclass(frozen=True, slots=True)
class Question:
    """A document cut in two.

    Attributes:
        query: what was taken out.
        passage: what is left.
        kind: one of KINDS.
    """

    query: str
    passage: str
    kind: str


def cut(document: Document, kind: str, seed: int = 0) -> Question | None:
    """Cut a document as its kind says; None where too little is left to ask with or about.

    Example: `gzip.GzipFile.peek`, "Return bytes. Nothing is consumed here at all." as a `name`
    gives the query "gzip gzip file peek" and the whole text; as a `summary` the query "Return
    bytes." would be too short.
    """
    sentences = document.sentences
    if kind == "name":
        query = name_words(document.name)
        return Question(query, document.text, kind) if len(document.text.split()) >= 8 else None
    first, others = sentences[0], sentences[1:]
    pick = random.Random(f"{seed} {document.name}")
    asked = first if kind == "summary" else pick.choice(others) if others else ""
    if not MIN_WORDS <= len(asked.split()) <= MAX_WORDS:
        return None
    left = [s for s in sentences if s != asked]
    if sum(len(s.split()) for s in left) < 8:
        return None
    title = document.name if kind == "summary" else ""
    query = as_person(asked, pick) if kind == "summary" else asked
    return Question(query, f"{title}\n{' '.join(left)}".strip(), kind)


def kind_of(document: Document) -> str:
    """Return the kind of a document in a collection: by its name alone."""
    return KINDS[xxhash.xxh3_64_intdigest(document.name.encode(), seed=1) % len(KINDS)]


def name_words(name: str) -> str:
    """Return a name as words: `gzip.GzipFile.readAll` becomes "gzip gzip file read all"."""
    return " ".join(WORD.findall(name)).lower()


def as_person(sentence: str, pick: random.Random) -> str:
    """Put some imperative summaries as a question."""
    verb = sentence.partition(" ")[0]
    if not verb.isalpha() or verb.endswith("s") or pick.random() > ASKED_IN_WORDS:
        return sentence
    return pick.choice(OPENINGS) + sentence[0].lower() + sentence[1:].rstrip(".") + "?"


def collection(documents: Sequence[Document]) -> list[tuple[Document, Question | None]]:
    """Cut each document by its own kind.

    Returns:
        Each document with its question; where there is none, it is in the collection as a whole.
    """
    return [(document, cut(document, kind_of(document))) for document in documents]
