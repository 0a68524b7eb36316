"""Queries made of documentation alone: what is taken out of a text is asked of the rest.

There are three kinds. `name` asks with the words of the qualified name for the text without its
title. `summary` asks with the first sentence, and `sentence` with a later one, for the text without
that sentence. In a collection every passage is treated the way its kind treats a question's
passage, so that nothing but content tells the right one from the others.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import xxhash

from jobs.demo_training.documentation import Document

KINDS = ("name", "summary", "sentence")
MIN_QUERY_WORDS, MAX_QUERY_WORDS = 4, 30
"""Limits the length of a sentence that may be a query."""
MIN_PASSAGE_WORDS = 8
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
OPENINGS = ("how do i ", "how to ", "how can i ", "what is the way to ", "i want to ")
ASKED_IN_WORDS = 0.3
"""Share of summaries that are put as a person would put them: "how do I return …"."""


@dataclass(frozen=True, slots=True)
class Question:
    """A document cut in two.

    Attributes:
        query: What was taken out.
        passage: What is left.
        kind: One of KINDS.
    """

    query: str
    passage: str
    kind: str


def cut(document: Document, kind: str, seed: int = 0) -> Question | None:
    """Cut a document as its kind says; None if too little is left to ask with or about.

    Example: `gzip.GzipFile.peek`, "Return bytes. Nothing is consumed here at all." as a `name`
    gives the query "gzip gzip file peek" and the whole text; as a `summary` the query "Return
    bytes." would be too short.
    """
    sentences = document.sentences
    if kind == "name":
        enough = len(document.text.split()) >= MIN_PASSAGE_WORDS
        return Question(name_words(document.name), document.text, kind) if enough else None
    first, others = sentences[0], sentences[1:]
    pick = random.Random(f"{seed} {document.name}")
    asked = first if kind == "summary" else pick.choice(others) if others else ""
    if not MIN_QUERY_WORDS <= len(asked.split()) <= MAX_QUERY_WORDS:
        return None
    left = [s for s in sentences if s != asked]
    if sum(len(s.split()) for s in left) < MIN_PASSAGE_WORDS:
        return None
    title = document.name if kind == "summary" else ""
    query = as_person(asked, pick) if kind == "summary" else asked
    return Question(query, f"{title}\n{' '.join(left)}".strip(), kind)


def kind_of(document: Document) -> str:
    """Return the kind of a document in a collection; its name alone decides."""
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
