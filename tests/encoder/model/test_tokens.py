"""Token ids are those of the checkpoint's tokenizer, whoever makes them."""

import pytest
from fastokens import Tokenizer as Fast
from hypothesis import given
from hypothesis import strategies as st

from kalm_encoder.model.checkpoint import DEMO_NAME, resolve
from kalm_encoder.model.tokens import fast_passage_ids, passage_ids
from kalm_encoder.prompts import render_passage
from tests.conftest import SCRIPTS

PIECES = ["<bos>", "<end_of_turn>", "▁", "▁▁", ">▁</", "\n\n", "\t", " ", "    ", "e\u0301", "\0"]
TEXTS = st.lists(
    st.lists(st.one_of(st.text(max_size=12), st.sampled_from([*PIECES, *SCRIPTS])), max_size=8).map(
        "".join
    ),
    max_size=4,
)


@pytest.fixture(scope="module")
def demo():
    return resolve(DEMO_NAME).tokenizer()


@pytest.fixture(scope="module")
def like_gemma(model_dir):
    return resolve(str(model_dir)).tokenizer()


@pytest.fixture(scope="module")
def fast(like_gemma):
    return fast_passage_ids(like_gemma)


def as_lists(flat):
    ids, lengths = flat[0].tolist(), flat[1].tolist()
    return [[ids.pop(0) for _ in range(length)] for length in lengths]


@given(texts=TEXTS)
def test_ids_are_those_of_the_tokenizer(texts, demo, like_gemma, fast):
    rendered = [render_passage(text) for text in texts]
    for tokenizer in (demo, like_gemma):
        want = tokenizer(rendered, add_special_tokens=False)["input_ids"] if texts else []
        assert as_lists(passage_ids(tokenizer, texts)) == want
    assert as_lists(fast(texts)) == want


def test_a_tokenizer_that_fastokens_does_not_know_is_used_itself(demo):
    assert fast_passage_ids(demo) is None


def test_a_fast_tokenizer_with_other_ids_is_not_used(like_gemma, monkeypatch, caplog):
    class Wrong:
        def __init__(self, right):
            self._right = right

        def encode_batch_flat(self, texts, **options):
            return self._right.encode_batch_flat([text.lower() for text in texts], **options)

    load = Fast.from_json_str

    class Wrongs:
        from_json_str = staticmethod(lambda json: Wrong(load(json)))

    monkeypatch.setattr("fastokens.Tokenizer", Wrongs)
    assert fast_passage_ids(like_gemma) is None
    assert "other ids than this tokenizer" in caplog.text


def test_what_a_file_says_of_length_does_not_cut_passages(model_dir):
    tokenizer = resolve(str(model_dir)).tokenizer()
    whole = passage_ids(tokenizer, SCRIPTS)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    fast = fast_passage_ids(tokenizer)
    for ids_of in (fast, lambda texts: passage_ids(tokenizer, texts)):
        assert as_lists(ids_of(SCRIPTS)) == as_lists(whole)
