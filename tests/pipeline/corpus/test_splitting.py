"""Documents are cut into passages that fit, lose nothing, and stay where they are under edits."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_encoder.model.checkpoint import resolve
from kalm_encoder.model.tokens import passage_ids
from pipeline.corpus.passages import Passage, join_title
from pipeline.corpus.shards import ShardRows
from pipeline.corpus.splitting import Splitter
from tests.conftest import SCRIPTS, WORDS

TOKENS, OVERLAP = 64, 8
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"
ALPHABET = f"日本語の文章。！ 제목은 สวัสดีครับกำ नमस्ते। مرحبا؟ été e\u0301 ß﷽ {FAMILY}🇩🇪 a.\n\t"
PARTS = st.sampled_from(
    [*SCRIPTS, *WORDS, *ALPHABET, "\n\n", ". ", "x" * 300, "日" * 90, "a\u0301" * 50]
)


@pytest.fixture(scope="module")
def tokenizer():
    return resolve("kalm-demo").tokenizer()


def tokens(tokenizer, texts):
    return passage_ids(tokenizer, texts)[1].tolist()


@given(parts=st.lists(PARTS, max_size=40), title=st.sampled_from(["", "A title", "標題"]))
def test_every_character_is_in_a_passage_that_fits(tokenizer, parts, title):
    text = "".join(parts)
    spans = Splitter(tokenizer, TOKENS, OVERLAP).cut(title, text)
    lengths = tokens(tokenizer, [join_title(title, text[begin:end]) for begin, end in spans])
    assert max(lengths) <= TOKENS
    assert spans[0].begin == 0 and spans[-1].end == len(text)
    for before, after in pairwise(spans):
        assert before.begin < after.begin <= before.end < after.end
        assert tokens(tokenizer, [text[after.begin : before.end]])[0] <= 2 * OVERLAP + 6
    whole = tokens(tokenizer, [join_title(title, text)])[0]
    assert (len(spans) == 1) == (whole <= TOKENS)


def test_cuts_are_at_ends_of_sentences_and_never_between_a_letter_and_its_marks(tokenizer):
    rng = random.Random(1)
    for _ in range(3):
        text = "".join(rng.choices(ALPHABET, k=900))
        for begin, _ in Splitter(tokenizer, TOKENS, 0).cut("", text)[1:]:
            assert text[begin] not in "\u0301\u200d" and text[begin - 1] != "\u200d"
    for end in ("。", "! ", "؟ ", "।", ".\n"):
        text = "".join(f"{' '.join(rng.choices(WORDS, k=9))}{end}" for _ in range(40))
        for begin, _ in Splitter(tokenizer, TOKENS, 0).cut("", text)[1:]:
            assert text[:begin].rstrip().endswith(end.rstrip())


def test_a_title_is_in_each_passage_and_one_without_room_for_the_text_is_a_reject(tokenizer):
    text = ". ".join(" ".join(WORDS) for _ in range(9))
    split = Splitter(tokenizer, TOKENS, OVERLAP)
    long = " ".join(WORDS[:30])
    rows = [
        Passage("a", "", 3, "Words", text),
        Passage("b", "", 4, long, text),
        Passage("c", "", 5),
    ]
    passages, rejects, metadata = split(ShardRows(rows, []), "c.jsonl")
    assert all(p.text.startswith("Words ") for p in passages[:-1])
    assert [p.id for p in passages] == [f"a#{k}" for k in range(len(passages) - 1)] + ["c#0"]
    assert [(r.line, r.id) for r in rejects] == [(4, "b")] and "title" in rejects[0].reason
    spans = zip(metadata["span_begin"].to_pylist(), metadata["span_end"].to_pylist(), strict=True)
    for passage, (begin, end) in zip(passages[:-1], spans, strict=False):
        assert passage.text == join_title("Words", text[begin:end])
    empty, rejects, metadata = split(ShardRows([rows[1]], []), "c.jsonl")
    assert not empty and len(rejects) == 1 and len(metadata) == 0


def test_an_edit_moves_the_passages_that_it_touches_and_at_most_one_more(tokenizer):
    """Of random edits almost all; where an edit removes a cut, its neighbours may be cut anew."""
    rng = random.Random(0)

    def sentence():
        return " ".join(rng.choices(WORDS, k=rng.randrange(4, 14))).capitalize() + ". "

    split, more = Splitter(tokenizer, TOKENS, OVERLAP), []
    text = "".join(sentence() for _ in range(200))
    old = split.cut("", text)
    known = {text[slice(*span)] for span in old}
    for _ in range(60):
        at = rng.randrange(len(text))
        end = at + rng.choice([0, 5, 100])
        new = rng.choice(["", "word", sentence(), sentence() * 9])
        edited = text[:at] + new + text[end:]
        now = split.cut("", edited)
        changed = sum(edited[slice(*span)] not in known for span in now)
        touched = max(
            sum(span.begin <= end and at <= span.end for span in old),
            sum(span.begin <= at + len(new) and at <= span.end for span in now),
        )
        more.append(changed - touched)
    assert sum(n <= 1 for n in more) >= 0.95 * len(more)
    assert max(more) <= 3
    assert len(old) > 30
