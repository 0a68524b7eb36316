"""Texts that the table holds are scored by their stored states, and only the others are encoded."""

import pickle

import pytest

from kalm_encoder import Reranker
from kalm_encoder.errors import InputError, MissingTextsError
from tests.conftest import make_texts

IDS = [f"p{i}" for i in range(60)]
TEXTS = make_texts(60)
NEW = "a text that nobody stored"


@pytest.fixture(scope="module")
def reranker(small_table):
    return Reranker.open(small_table, match_text=True)


def numbers(results):
    return [(r.score, r.margin, r.ratio) for r in results]


@pytest.mark.parametrize("options", [{}, {"ratio": 16}, {"cascade": [(8, 20), (2, None)]}])
def test_scores_are_those_of_the_ids_bit_for_bit(reranker, options):
    distinct = list(dict.fromkeys(TEXTS))
    ids = [reranker.table.ids_by_text(distinct)[text] for text in distinct]
    by_id = reranker.rerank("token", ids, **options)
    by_text = reranker.rerank_texts("token", TEXTS, top_k=50, **options)
    assert numbers(by_text) == numbers(by_id)[:50]
    assert [r.id for r in by_text] == [r.id for r in by_id[:50]]
    assert all(TEXTS[int(r.id[1:])] == r.text for r in by_text)


def test_only_texts_that_are_not_stored_are_encoded(reranker, encoder):
    encoded = []

    def encode(texts):
        encoded.append(list(texts))
        return encoder.encode(texts, ratio=2)

    changed = TEXTS[0].swapcase()
    asked = [TEXTS[0], NEW, TEXTS[1], changed, NEW]
    results = {r.text: r for r in reranker.rerank_texts("token", asked, encode=encode)}
    assert encoded == [[NEW, changed]]
    assert {text for text, r in results.items() if r.id is None} == {NEW, changed}
    alone = reranker.rerank("token", ["x"], passages={"x": encoder.encode([NEW], ratio=2)[0]})[0]
    assert results[NEW].score == pytest.approx(alone.score, abs=1e-6)
    reranker.rerank_texts("token", TEXTS, encode=encode)
    assert len(encoded) == 1, "the encoder is not asked for nothing"


def test_texts_that_are_neither_stored_nor_encoded(reranker):
    asked = [NEW, TEXTS[0], f"{NEW} either"]
    with pytest.raises(MissingTextsError, match=r"^2 of the texts .*'a text that nobody") as caught:
        reranker.rerank_texts("token", asked)
    assert pickle.loads(pickle.dumps(caught.value)).texts == [NEW, f"{NEW} either"]
    dropped = reranker.rerank_texts("token", asked, on_missing="drop")
    assert [r.text for r in dropped] == [TEXTS[0]]
    last = reranker.rerank_texts("token", asked, on_missing="last")
    assert [(r.text, r.ratio) for r in last] == [(TEXTS[0], 2), (NEW, None), (asked[2], None)]
    assert numbers(last[:1]) == numbers(dropped)


def test_it_must_be_asked_for(small_table, reranker):
    with pytest.raises(InputError, match="was opened without match_text"):
        Reranker.open(small_table).rerank_texts("token", TEXTS)
    copy = pickle.loads(pickle.dumps(reranker))
    assert numbers(copy.rerank_texts("q", TEXTS)) == numbers(reranker.rerank_texts("q", TEXTS))
