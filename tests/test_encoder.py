import numpy as np
import pytest
import torch

from kalm_encoder import PassageEncoder
from kalm_encoder.batching import padded_size
from kalm_encoder.encoder import MAX_PADDING
from kalm_encoder.pooling import num_groups
from tests.conftest import SCRIPTS, make_texts


def test_output_is_in_input_order_whatever_the_batches(encoder, model_dir):
    texts = ["", *SCRIPTS, *make_texts(40, seed=3)]
    wide = encoder.encode(texts)
    narrow = PassageEncoder.load(str(model_dir), token_budget=1).encode(texts)
    for i, text in enumerate(texts):
        alone = encoder.encode([text])[0]
        for other in (wide[i], narrow[i]):
            assert other.num_tokens == alone.num_tokens
            np.testing.assert_allclose(other.states, alone.states, atol=1e-5)


def test_long_passages_are_cut_and_say_so(model_dir):
    short = PassageEncoder.load(str(model_dir), max_length=32)
    text = make_texts(1, seed=1)[0] + " word" * 100
    cut, whole = short.encode([text, "word"], ratio=4)
    assert (cut.num_tokens, cut.truncated, cut.states.shape) == (32, True, (8, 128))
    assert not whole.truncated
    assert whole.states.shape[0] == num_groups(whole.num_tokens, 4)


def test_no_texts_give_no_states(encoder):
    assert encoder.encode([]) == []


def test_out_of_memory_halves_the_batch_and_goes_on(encoder, monkeypatch):
    texts = make_texts(30, seed=5)
    expected = encoder.encode(texts)
    sizes = []
    forward = PassageEncoder.forward

    def small_memory(self, batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("pretend")
        return forward(self, batch)

    monkeypatch.setattr(PassageEncoder, "forward", small_memory)
    for got, want in zip(encoder.encode(texts), expected, strict=True):
        np.testing.assert_allclose(got.states, want.states, atol=1e-5)
    assert max(sizes) > 3 >= min(sizes)


def test_one_passage_that_does_not_fit_is_an_error(encoder, monkeypatch):
    def no_memory(self, batch):
        raise torch.OutOfMemoryError("pretend")

    monkeypatch.setattr(PassageEncoder, "forward", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        encoder.encode(["a", "b"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_states_are_close_to_those_of_the_cpu(encoder, model_dir):
    texts = make_texts(20, seed=8)
    gpu = PassageEncoder.load(str(model_dir), device="cuda").encode(texts)
    for got, want in zip(gpu, encoder.encode(texts), strict=True):
        cosine = (got.states * want.states).sum(1) / (
            np.linalg.norm(got.states, axis=1) * np.linalg.norm(want.states, axis=1)
        )
        assert cosine.min() > 0.99


def test_a_large_budget_does_not_buy_padding(model_dir):
    encoder = PassageEncoder.load(str(model_dir), token_budget=65536)
    lengths = [int(8 + 1000 * (i / 1000) ** 4) for i in range(1000)]
    batches = encoder.batches(lengths)
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    assert 1 - sum(lengths) / padded_size(lengths, batches) <= MAX_PADDING
