"""Cuts documents into passages of the model's tokens, so that no token of a document is lost.

Where a text is cut depends only on the text near the cut. Every place between two tokens has a
priority: ends of sentences and lines come first, then ends of words, and among equals a hash of the
characters around the place decides. A text that is too long is cut at its first place by priority,
and so are its parts, until each part fits. An edit then changes the parts that it touches, and the
cuts behind it stay. Filling one passage after the other would move all of them. The price is that a
part has a quarter to the whole of the allowed tokens, about 0.6 of them in the mean.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kalm_encoder.errors import InputError
from kalm_encoder.model.tokens import passage_ids
from kalm_encoder.table.metadata import TYPES
from kalm_encoder.table.spec import SPLIT_COLUMNS, TableSpec
from pipeline.corpus.passages import Passage, Reject, join_title
from pipeline.corpus.shards import ShardRows

SENTENCE_END = re.compile(
    r"""(?:[.!?…]["'”’»)\]]*(?=\s)|[。！？｡؟۔।॥]["'”’」』）]*|\n)(?P<space>\s*)"""  # noqa: RUF001
)
"""The end of a sentence or a line, and the white space behind it."""
SENTENCE, WORD, LETTER, MARK = range(4)
"""What a place is the end of, best first. Behind the last, a mark is drawn on the letter before."""
JOINERS = "\u200d\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
"""Signs beside the marks that belong to the emoji before them."""
CONTEXT_CHARS = 8
"""Characters on each side of a place that its hash is made of."""
SLACK_TOKENS = 4
"""Tokens by which a part may grow as it is tokenised alone. One that grows more is cut again."""
SMALLEST_SHARE = 4
"""A part has at least this fraction of the tokens that a part may have, so that few are tiny."""


class Span(NamedTuple):
    """A passage of a text: its first character, and the one behind its last."""

    begin: int
    end: int


class Splitter:
    """Cuts texts into passages.

    Args:
        tokenizer: Tokenizer of the model.
        tokens: Most tokens of a passage, with its prefix and title.
        overlap: Tokens that a passage repeats of the text before it, at most. It begins at a
            sentence or word in the first half of them, where there is one.
    """

    def __init__(self, tokenizer: Any, tokens: int, overlap: int) -> None:
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._overlap = overlap

    @classmethod
    def of(cls, spec: TableSpec, tokenizer: Any) -> Splitter | None:
        """Return the splitter of a table; None if its rows are passages as they are."""
        return cls(tokenizer, *spec.split) if spec.split else None

    def __call__(self, rows: ShardRows, path: str) -> ShardRows:
        """Cut the documents of a shard into passages `id#0`, `id#1` and so on.

        The metadata columns get those of SPLIT_COLUMNS. A document that cannot be cut is a reject.
        """
        rejects, passages = list(rows.rejects), list[Passage]()
        places, spans = list[int](), list[Span]()
        for place, document in enumerate(rows.passages):
            found = self.cut(document.title, document.body)
            if isinstance(found, str):
                rejects.append(Reject(path, document.line, found, document.id))
                continue
            for number, (begin, end) in enumerate(found):
                text = join_title(document.title, document.body[begin:end])
                passages.append(replace(document, id=f"{document.id}#{number}", text=text))
            places += [place] * len(found)
            spans += found
        documents = [rows.passages[place].id for place in places]
        columns = documents, [span.begin for span in spans], [span.end for span in spans]
        metadata: dict[str, Any] = {}
        if rows.metadata is not None:
            kept = rows.metadata.take(pa.array(places, pa.int64()))
            metadata |= zip(kept.column_names, kept.columns, strict=True)
        for (name, type), values in zip(SPLIT_COLUMNS, columns, strict=True):
            metadata[name] = pa.array(values, TYPES[type])
        return ShardRows(passages, rejects, pa.table(metadata))

    def cut(self, title: str, text: str) -> list[Span] | str:
        """Return the passages of a text in order, or the reason why there are none.

        Every character is in a passage, and no passage has more than the allowed tokens.
        """
        if self._lengths(title, [text])[0] <= self._tokens:
            return [Span(0, len(text))]
        room = self._tokens - self._lengths(title, [""])[0] - SLACK_TOKENS
        if 2 * room < self._tokens:
            return (
                f"a title that leaves {max(0, room)} of {self._tokens} tokens to the text: raise "
                "--split, or name another field with --title-field"
            )
        places = Places(text, self._starts(text), room - self._overlap)
        bounds = places.divide()
        while True:
            begins = [0, *(places.before(bound, self._overlap) for bound in bounds[1:-1])]
            spans = list(map(Span, begins, places.chars[bounds[1:]].tolist()))
            lengths = self._lengths(title, [text[begin:end] for begin, end in spans])
            parts = zip(pairwise(bounds), lengths, strict=True)
            long = [part for part, n in parts if n > self._tokens]
            if not long:
                return spans
            if any(end - begin < 2 for begin, end in long):
                return f"a character has more than {self._tokens} tokens: raise --split"
            bounds = sorted(bounds + [places.best(*part) for part in long])

    def _starts(self, text: str) -> NDArray[np.int64]:
        encoded = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        return np.array([begin for begin, _ in encoded.offsets], np.int64)

    def _lengths(self, title: str, parts: Sequence[str]) -> list[int]:
        texts = [join_title(title, part) for part in parts]
        lengths: list[int] = passage_ids(self._tokenizer, texts)[1].tolist()
        return lengths


def check_no_choice(on_duplicate: str) -> None:
    """Refuse to choose among documents with the same id, whose passages have the same ids.

    Raises:
        InputError: If one is to be chosen.
    """
    if on_duplicate != "error":
        raise InputError(
            f"--on-duplicate {on_duplicate} would mix the passages of two documents: mend the "
            "corpus, so that no id of a document that is split is repeated"
        )


class Places:
    """The places at which a text can be cut: its begin, those between two tokens, and its end.

    Args:
        text: The text.
        starts: First character of each of its tokens.
        most: Most tokens of a part.

    Attributes:
        chars: (places,) int64 characters before each place.
        tokens: (places,) int64 tokens before each place.
    """

    def __init__(self, text: str, starts: NDArray[np.int64], most: int) -> None:
        # Some tokens begin at the same character, as a letter may have several tokens.
        chars, tokens = np.unique(np.maximum.accumulate(starts), return_index=True)
        inner = (chars > 0) & (chars < len(text))
        self.chars = np.concatenate([[0], chars[inner], [len(text)]])
        self.tokens = np.concatenate([[0], tokens[inner], [len(starts)]])
        self._text = text
        self._most = most

    def divide(self) -> list[int]:
        """Return the places at which the text is divided, its begin and its end included."""
        bounds, parts = [0], [(0, len(self.chars) - 1)]
        while parts:
            begin, end = parts.pop()
            if self.tokens[end] - self.tokens[begin] <= self._most or end - begin < 2:
                bounds.append(end)
            else:
                place = self.best(begin, end)
                parts += [(place, end), (begin, place)]
        return bounds

    def best(self, begin: int, end: int) -> int:
        """Return the place at which to cut the part between two places, which has others in it."""
        first, last = self.tokens[begin], self.tokens[end]
        margin = min(self._most, last - first) // SMALLEST_SHARE
        low, high = np.searchsorted(self.tokens, [first + margin, last - margin + 1])
        low, high = max(low, begin + 1), min(high, end)
        if low >= high:
            low, high = begin + 1, end
        return int(low + self._priorities[low:high].argmin())

    def before(self, place: int, overlap: int) -> int:
        """Return the character at which a passage begins that repeats tokens before a place."""
        last = self.tokens[place]
        low, high = np.searchsorted(self.tokens, [last - overlap, last - overlap // 2])
        return int(self.chars[low + self._kinds[low : high + 1].argmin()])

    @cached_property
    def _priorities(self) -> NDArray[np.uint64]:
        """The (places,) priorities; the smallest one is the best."""
        codes = np.pad(_codes(self._text), CONTEXT_CHARS).astype(np.uint64)
        hashes = np.zeros(len(self.chars), np.uint64)
        for i in range(2 * CONTEXT_CHARS):
            hashes = _mixed(hashes ^ codes[self.chars + i])
        return self._kinds.astype(np.uint64) << np.uint64(62) | hashes >> np.uint64(2)

    @cached_property
    def _kinds(self) -> NDArray[np.int64]:
        """What each of the (places,) places is the end of."""
        codes, at = np.unique(_codes(self._text), return_inverse=True)
        letters = [chr(code) for code in codes]
        is_space = np.array([c.isspace() for c in letters])[at]
        is_mark = np.array([unicodedata.category(c)[0] == "M" or c in JOINERS for c in letters])[at]
        is_joiner = np.array([c == JOINERS[0] for c in letters])[at]
        kinds = np.full(len(at) + 1, LETTER)
        kinds[:-1][is_space] = kinds[1:][is_space] = WORD
        for end in SENTENCE_END.finditer(self._text):
            kinds[end.start("space") : end.end() + 1] = SENTENCE
        kinds[:-1][is_mark] = kinds[1:][is_joiner] = MARK
        of_places: NDArray[np.int64] = kinds[self.chars]
        return of_places


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _mixed(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread the bits of 64-bit numbers: the last steps of MurmurHash3, by Austin Appleby."""
    hashes = (hashes ^ hashes >> np.uint64(33)) * np.uint64(0xFF51AFD7ED558CCD)
    return hashes ^ hashes >> np.uint64(33)
