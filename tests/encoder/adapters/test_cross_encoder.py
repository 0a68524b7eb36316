"""The calls of sentence-transformers' CrossEncoder, compared with a real one."""

import inspect

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.evaluation import (
    CrossEncoderClassificationEvaluator,
    CrossEncoderCorrelationEvaluator,
    CrossEncoderRerankingEvaluator,
)
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from kalm_encoder import PassageEncoder, Reranker
from kalm_encoder.adapters.cross_encoder import KaLMCrossEncoder
from kalm_encoder.errors import InputError, MismatchError, MissingIdsError, MissingTextsError
from tests.conftest import encode_table, make_texts, write_corpus

QUERY = "token state"
IDS = ["p7", "p3", "p41", "p3", "p0"]


@pytest.fixture(scope="module")
def reranker(small_table):
    return Reranker.open(str(small_table))


@pytest.fixture(scope="module")
def real(model_dir, tmp_path_factory):
    """A real CrossEncoder: one BERT layer with random weights."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return CrossEncoder(str(folder), device="cpu", max_length=64)


def score_of(reranker, query=QUERY, **options):
    return {r.id: r.score for r in reranker.rerank(query, sorted(set(IDS)), **options)}


def shape(value):
    """What a caller can tell apart, numbers aside."""
    if isinstance(value, list):
        return [shape(v) for v in value]
    if isinstance(value, dict):
        return {k: type(v) for k, v in value.items()}
    return type(value), getattr(value, "dtype", None), getattr(value, "shape", None)


def test_rank_is_the_reranking_of_the_table(reranker):
    ranked = KaLMCrossEncoder(reranker).rank(QUERY, IDS, return_documents=True)
    want = score_of(reranker)
    assert sorted(row["corpus_id"] for row in ranked) == [0, 1, 2, 3, 4]
    for row in ranked:
        assert row["text"] == IDS[row["corpus_id"]]
        assert row["score"] == pytest.approx(want[row["text"]], abs=1e-6)
    scores = [row["score"] for row in ranked]
    assert scores == sorted(scores, reverse=True)
    assert len(set(want.values())) > 1


def test_a_repeated_document_has_its_score_at_each_position(reranker):
    scores = KaLMCrossEncoder(reranker).predict([(QUERY, i) for i in IDS])
    assert scores[1] == scores[3]
    np.testing.assert_allclose(scores, [score_of(reranker)[i] for i in IDS], atol=1e-6)


def test_pairs_of_several_queries_come_back_in_their_order(reranker):
    pairs = [(QUERY, "p1"), ("shard", "p1"), (QUERY, "p2"), ("shard", "p3")]
    scores = KaLMCrossEncoder(reranker).predict(pairs)
    want = [reranker.rerank(query, [i])[0].score for query, i in pairs]
    np.testing.assert_allclose(scores, want, atol=1e-6)
    assert scores[0] != scores[1]


@pytest.mark.parametrize("ratio", [None, 2, 8, 16])
def test_texts_score_as_their_stored_states_do(reranker, encoder, ratio):
    texts = make_texts(60)
    how = {"ratio": ratio, "instruction": "Judge it.", "system_instruction": "Yes?"}
    live = KaLMCrossEncoder(reranker, encoder=encoder, **how)
    stored = KaLMCrossEncoder(reranker, **how)
    got = live.predict([(QUERY, texts[int(i[1:])]) for i in IDS])
    np.testing.assert_allclose(got, stored.predict([(QUERY, i) for i in IDS]), atol=1e-5)
    want = score_of(reranker, **how)
    np.testing.assert_allclose(got, [want[i] for i in IDS], atol=1e-5)


def test_texts_that_the_table_holds_are_not_encoded(small_table, encoder):
    texts, new = make_texts(60), "a text that nobody stored"
    asked = [*(texts[int(i[1:])] for i in IDS), new]
    matching = Reranker.open(small_table, match_text=True)
    by_id = KaLMCrossEncoder(matching).predict([(QUERY, i) for i in IDS])
    alone = KaLMCrossEncoder(matching, match_text=True)
    np.testing.assert_array_equal(alone.predict([(QUERY, text) for text in asked[:-1]]), by_id)
    with pytest.raises(MissingTextsError, match=r"^1 of the texts"):
        alone.rank(QUERY, asked)
    dropped = KaLMCrossEncoder(matching, match_text=True, on_missing="drop")
    assert {row["corpus_id"] for row in dropped.rank(QUERY, asked)} == set(range(len(IDS)))
    both = KaLMCrossEncoder(small_table, match_text=True, encoder=encoder)
    scores = both.predict([(QUERY, text) for text in asked])
    fresh = KaLMCrossEncoder(matching, encoder=encoder).predict((QUERY, new))
    np.testing.assert_allclose(scores, [*by_id, fresh], atol=1e-6)
    with pytest.raises(InputError, match="was opened without match_text"):
        KaLMCrossEncoder(Reranker.open(small_table), match_text=True)


@pytest.mark.parametrize(
    "options",
    [{}, {"convert_to_tensor": True}, {"convert_to_numpy": False}, {"batch_size": 1}],
)
def test_predict_returns_what_the_real_one_does(small_table, real, options):
    ours = KaLMCrossEncoder(str(small_table))
    for inputs in ([(QUERY, "p1"), (QUERY, "p2")], [[QUERY, "p1"]], (QUERY, "p1"), [QUERY, "p1"]):
        want = real.predict(inputs, show_progress_bar=False, **options)
        assert shape(ours.predict(inputs, show_progress_bar=False, **options)) == shape(want)
    assert len(ours.predict([])) == len(real.predict([])) == 0


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"return_documents": True}])
def test_rank_returns_what_the_real_one_does(reranker, real, options):
    ours = KaLMCrossEncoder(reranker)
    want = real.rank(QUERY, IDS, **options)
    assert shape(ours.rank(QUERY, IDS, **options)) == shape(want)
    assert ours.rank(QUERY, []) == real.rank(QUERY, []) == []


def test_every_parameter_is_one_of_the_real_ones():
    # No longer in the signatures, but their decorator still takes them.
    dropped = {"convert_to_numpy", "convert_to_tensor", "num_workers", "apply_softmax"}
    for method in ("rank", "predict"):
        real = list(inspect.signature(getattr(CrossEncoder, method)).parameters)
        ours = inspect.signature(getattr(KaLMCrossEncoder, method)).parameters
        assert set(ours) <= {*real, *dropped}
        by_place = [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert by_place == real[: len(by_place)]


def test_an_encoder_of_other_states_is_refused(reranker, model_dir, encoder, tmp_path):
    shorter = PassageEncoder(str(model_dir), max_length=64)
    with pytest.raises(MismatchError, match=r"max_length 1024, the encoder 64: load it with"):
        KaLMCrossEncoder(reranker, encoder=shorter)
    corpus = write_corpus(tmp_path / "c.jsonl", make_texts(2))
    encode_table(model_dir, corpus, tmp_path / "t.lance", max_length=64)
    with pytest.raises(MismatchError) as error:
        KaLMCrossEncoder(str(tmp_path / "t.lance"), encoder=encoder)
    assert error.value.field == "max_length"


def test_what_the_table_cannot_do_is_said(reranker):
    with pytest.raises(InputError, match="ratio 3 is not a multiple"):
        KaLMCrossEncoder(reranker, ratio=3)
    with pytest.raises(MissingIdsError, match="'nowhere'"):
        KaLMCrossEncoder(reranker).rank(QUERY, ["p1", "nowhere"])


def test_the_evaluators_of_sentence_transformers_run(reranker, encoder):
    pairs = [[QUERY, f"p{n}"] for n in range(8)]
    samples = [{"query": QUERY, "positive": ["p3"], "negative": ["p1", "p2", "p41"]}]
    for model in (KaLMCrossEncoder(reranker), KaLMCrossEncoder(reranker, encoder=encoder)):
        found = CrossEncoderRerankingEvaluator(samples, write_csv=False)(model)
        assert 0 < found["mrr@10"] <= 1
        CrossEncoderClassificationEvaluator(pairs, [0, 1] * 4, write_csv=False)(model)
        CrossEncoderCorrelationEvaluator(pairs, [n / 8 for n in range(8)], write_csv=False)(model)


NOTHING = [
    {"activation_fn": None}, {"activation_fn": torch.nn.Sigmoid()}, {"apply_softmax": False},
    {"apply_softmax": None}, {"num_workers": 0}, {"prompt_name": None}, {"prompt": None},
    {"batch_size": 64}, {"device": None}, {"device": "cpu"}, {"device": torch.device("cpu")},
    {"pool": None}, {"chunk_size": 3},
]  # fmt: skip


@pytest.mark.parametrize("options", NOTHING)
def test_what_changes_nothing_is_accepted(reranker, options):
    ours = KaLMCrossEncoder(reranker)
    pairs = [(QUERY, i) for i in IDS]
    np.testing.assert_array_equal(ours.predict(pairs, **options), ours.predict(pairs))
    assert ours.rank(QUERY, IDS, **options) == ours.rank(QUERY, IDS)


def test_a_batch_size_by_place_is_accepted_as_in_older_versions(reranker):
    ours = KaLMCrossEncoder(reranker)
    pairs = [(QUERY, i) for i in IDS]
    np.testing.assert_array_equal(ours.predict(pairs, 32), ours.predict(pairs))
    assert ours.rank(QUERY, IDS, 2, False, 32) == ours.rank(QUERY, IDS, 2)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"activation_fn": torch.nn.Identity()}, "margins of Reranker.rerank"),
        ({"apply_softmax": True}, "leave it out"),
        ({"prompt_name": "web"}, "instruction to KaLMCrossEncoder"),
        ({"prompt": "Find it."}, "instruction to KaLMCrossEncoder"),
        ({"device": "cuda:7"}, "the decoder is on cpu; Reranker.open takes a device"),
        ({"device": ["cpu", "cpu"]}, "Reranker.open takes a device"),
        ({"pool": {}}, "leave it out"),
    ],
)
def test_what_would_change_scores_is_refused_with_a_remedy(reranker, options, remedy):
    ours = KaLMCrossEncoder(reranker)
    (name,) = options
    with pytest.raises(InputError, match=f"^{name}=.* cannot be used here: .*{remedy}"):
        ours.predict([(QUERY, "p1")], **options)
    with pytest.raises(InputError, match=remedy):
        ours.rank(QUERY, IDS, **options)
    with pytest.raises(TypeError):
        ours.predict([(QUERY, "p1")], processing_kwargs={"text": {"max_length": 8}})


def test_unknown_ids_can_be_dropped_or_ranked_last(reranker):
    ids = ["p1", "nowhere", "p2"]
    dropped = KaLMCrossEncoder(reranker, on_missing="drop")
    assert {row["corpus_id"] for row in dropped.rank(QUERY, ids)} == {0, 2}
    last = KaLMCrossEncoder(reranker, on_missing="last")
    ranked = last.rank(QUERY, ids)
    assert (ranked[-1]["corpus_id"], ranked[-1]["score"]) == (1, 0.0)
    with pytest.raises(InputError, match="drops none: use on_missing=last"):
        dropped.predict([(QUERY, i) for i in ids])
    scores = last.predict([(QUERY, i) for i in ids])  # the remedy
    assert scores[1] == 0 < min(scores[0], scores[2])
    with pytest.raises(InputError, match="on_missing 'skip'"):
        KaLMCrossEncoder(reranker, on_missing="skip")


def test_a_path_is_an_address(small_table):
    assert KaLMCrossEncoder(small_table).rank(QUERY, IDS)
    assert Reranker.open(small_table).rerank(QUERY, IDS)
