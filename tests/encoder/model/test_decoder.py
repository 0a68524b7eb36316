import random

import numpy as np
import pytest
import torch

from kalm_encoder import QueryDecoder
from kalm_encoder.errors import InputError, NonFiniteError
from kalm_encoder.model import onednn
from kalm_encoder.model.batching import make_batches
from kalm_encoder.model.decoder import MAX_PADDING, QUERY_MAX_TOKENS
from kalm_encoder.model.decoder_forward import last_hidden
from kalm_encoder.model.pairs import Pair, memory_of
from tests.conftest import make_texts


@pytest.fixture(scope="module")
def states(encoder):
    return [p.states for p in encoder.encode(make_texts(40, seed=2), ratio=2)]


def test_company_and_order_change_no_score(decoder, model_dir, states):
    query = "which shard holds the passage"
    together = decoder.score(query, states)
    alone = [decoder.score(query, [s])[0] for s in states]
    narrow = QueryDecoder(str(model_dir), token_budget=1).score(query, states)
    order = list(range(len(states)))
    random.Random(0).shuffle(order)
    shuffled = decoder.score(query, [states[i] for i in order])
    for position, i in enumerate(order):
        for other in (alone[i], narrow[i], shuffled[position]):
            assert abs(other[0] - together[i][0]) <= 1e-5
    assert len({round(score, 4) for score, _ in together}) > 20  # passages do differ


def test_the_order_of_states_does_not_matter(decoder, states):
    longest = max(states, key=len)
    forward, backward = (decoder.score("q", [s])[0][0] for s in (longest, longest[::-1]))
    assert abs(forward - backward) <= 1e-5


def test_score_is_the_sigmoid_of_the_margin(decoder, states):
    for score, margin in decoder.score("query", states[:5]):
        assert score == pytest.approx(1 / (1 + np.exp(-margin)), abs=1e-6)


def test_instruction_changes_the_score(decoder, states):
    plain = decoder.score("query", states[:1])
    assert decoder.score("query", states[:1], instruction="Find duplicates.") != plain


def test_the_raw_query_is_cut_before_the_prompt(decoder):
    long = decoder.prompt("word " * 2000).ids
    assert len(long) - len(decoder.prompt("").ids) == QUERY_MAX_TOKENS


def test_no_states_give_no_scores(decoder):
    assert decoder.score("query", []) == []


def test_wrong_shapes_are_named(decoder):
    with pytest.raises(InputError, match=r"states\[1\] has shape \(2, 64\).*\(m, 128\)"):
        decoder.score("q", [np.zeros((1, 128), np.float32), np.zeros((2, 64), np.float32)])


def test_non_finite_logits_are_an_error(decoder):
    with pytest.raises(NonFiniteError, match="bfloat16 or float32"):
        decoder.score("q", [np.full((1, 128), np.nan, np.float32)])


def test_bfloat16_is_close(decoder, model_dir, states):
    half = QueryDecoder(str(model_dir), dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    for (a, _), (b, _) in zip(
        half.score("query", states), decoder.score("query", states), strict=True
    ):
        assert abs(a - b) < 0.05


@pytest.mark.skipif(not onednn.AVAILABLE, reason="no oneDNN here")
def test_packed_weights_change_no_score(model_dir, states, monkeypatch):
    found = []
    for packed in (False, True):
        monkeypatch.setattr(onednn, "FASTER", packed)
        decoder = QueryDecoder(str(model_dir))
        first = decoder.model.layers[0].self_attn.k_proj
        assert isinstance(first, onednn.PackedLinear) == packed
        found.append([score for score, _ in decoder.score("index table", states)])
    np.testing.assert_allclose(*found, atol=1e-5)


@pytest.mark.parametrize("lengths", [[5], [7, 7, 7], [1, 4, 9, 30]])
def test_the_exact_savings_change_nothing(decoder, lengths):
    """Against the model's own forward, which computes every position of every layer."""
    rng = np.random.default_rng(0)
    states = [rng.standard_normal((n, decoder.dim)).astype(np.float32) for n in lengths]
    pairs = [Pair(decoder.prompt("a query"), s) for s in states]
    memory = memory_of(pairs, decoder.device, torch.float32)
    prompt = torch.tensor([pairs[0].prompt.ids])
    with torch.inference_mode():
        ours, _ = last_hidden(decoder.model, prompt, memory)
        plain = decoder.model(
            input_ids=prompt.expand(len(states), -1),
            encoder_hidden_states=memory.states,
            encoder_attention_mask=memory.real.expand(len(states), -1).long(),
            use_cache=False,
        ).last_hidden_state[:, -1]
    assert (ours - plain).abs().max() <= 1e-5


def test_different_queries_go_together_and_change_no_score(decoder, states):
    queries = ["alpha", "index token", "which shard holds it", "beta", "index table"]
    pairs = [
        Pair(decoder.prompt(q, task), s)
        for q in queries
        for task in (None, "Find duplicates.")
        for s in states[:6]
    ]
    random.Random(1).shuffle(pairs)
    together = decoder.score_pairs(pairs)
    for pair, (score, _) in zip(pairs, together, strict=True):
        assert abs(decoder.score_pairs([pair])[0][0] - score) <= 1e-5


@pytest.mark.parametrize("window", [512, 16])
def test_a_recalled_passage_scores_the_same(model_dir, states, window):
    """Cold, warm, half warm, in any company, and where sliding layers do not see the beginning."""
    hot = QueryDecoder(str(model_dir), hot_bytes=1 << 28)
    hot.model.config.sliding_window = window
    plain = QueryDecoder(str(model_dir))
    plain.model.config.sliding_window = window
    for round, query in enumerate(("which shard", "quite another and longer query", "which shard")):
        prompt = hot.prompt(query)
        assert 0 < prompt.prefix < len(prompt.ids)
        chosen = range(0, len(states), 2 if round == 0 else 1)
        recalled = {i: hot.recall(prompt, i) for i in chosen}
        assert sum(e is not None for e in recalled.values()) == (0, 20, 40)[round]
        pairs = [Pair(prompt, states[i] if (e := recalled[i]) is None else e, i) for i in chosen]
        expected = plain.score(query, [states[i] for i in chosen])
        for (score, margin), (other, its) in zip(hot.score_pairs(pairs), expected, strict=True):
            assert abs(score - other) <= 1e-5
            assert abs(margin - its) <= 1e-4
    for others in (("Find duplicates.",), (None, "Answer yes or no.")):
        assert hot.recall(hot.prompt("which shard", *others), 0) is None


def test_the_memory_of_passages_is_bounded(model_dir, states):
    small = QueryDecoder(str(model_dir), hot_bytes=1 << 20)
    prompt = small.prompt("query")
    small.score_pairs([Pair(prompt, s, i) for i, s in enumerate(states)])
    assert 0 < small.hot.nbytes <= 1 << 20
    found = [small.recall(prompt, i) is not None for i in range(len(states))]
    assert 0 < sum(found) < len(states)


def test_padding_stays_below_a_twentieth(decoder):
    rng = random.Random(0)
    sizes = [rng.randint(1, 75) for _ in range(1000)]
    batches = make_batches(sizes, 4096, overhead=98, max_padding=MAX_PADDING)
    padded = sum(len(batch) * (98 + max(sizes[i] for i in batch)) for batch in batches)
    assert 1 - (sum(sizes) + 98 * 1000) / padded <= 0.05
    assert len(batches) < 60
