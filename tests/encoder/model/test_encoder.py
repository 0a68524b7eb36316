import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from kalm_encoder import PassageEncoder
from kalm_encoder.matryoshka import num_groups
from kalm_encoder.model.encoder import GPU_TOKEN_BUDGET, token_budget
from kalm_encoder.model.encoder_forward import PackedForward
from tests.conftest import SCRIPTS, make_texts


def test_output_is_in_input_order_whatever_the_batches(encoder, model_dir):
    texts = ["", *SCRIPTS, *make_texts(40, seed=3)]
    wide = encoder.encode(texts)
    narrow = PassageEncoder(str(model_dir), token_budget=1).encode(texts)
    for i, text in enumerate(texts):
        alone = encoder.encode([text])[0]
        for other in (wide[i], narrow[i]):
            assert other.num_tokens == alone.num_tokens
            np.testing.assert_allclose(other.states, alone.states, atol=1e-5)


def test_long_passages_are_cut_and_say_so(model_dir):
    short = PassageEncoder(str(model_dir), max_length=32)
    text = make_texts(1, seed=1)[0] + " word" * 100
    cut, whole = short.encode([text, "word"], ratio=4)
    assert (cut.num_tokens, cut.truncated, cut.states.shape) == (32, True, (8, 128))
    assert not whole.truncated
    assert whole.states.shape[0] == num_groups(whole.num_tokens, 4)


def test_several_threads_may_use_one_encoder(encoder):
    texts = make_texts(60, seed=4)
    alone = encoder.encode(texts)
    with ThreadPoolExecutor(4) as pool:
        for together in pool.map(encoder.encode, [texts] * 4):
            for one, other in zip(together, alone, strict=True):
                np.testing.assert_allclose(one.states, other.states, atol=1e-5)


def test_no_texts_give_no_states(encoder):
    assert encoder.encode([]) == []


def test_out_of_memory_halves_the_budget_for_good(model_dir, monkeypatch):
    encoder = PassageEncoder(str(model_dir), token_budget=4000)
    texts = make_texts(60, seed=5)
    expected = encoder.encode(texts)
    sizes = []
    forward = PackedForward.__call__

    def small_memory(self, ids, packed):
        sizes.append(len(ids))
        if sizes[-1] > 900:
            raise torch.OutOfMemoryError("pretend")
        return forward(self, ids, packed)

    monkeypatch.setattr(PackedForward, "__call__", small_memory)
    for _ in range(2):
        for got, want in zip(encoder.encode(texts), expected, strict=True):
            np.testing.assert_allclose(got.states, want.states, atol=1e-5)
    refused = [size for size in sizes if size > 900]
    assert 0 < len(refused) <= 3, "it must remember"
    assert refused == sorted(refused, reverse=True)
    assert encoder.token_budget <= 1000


def test_the_budget_of_a_gpu_fits_its_free_memory():
    assert token_budget(60e9, 300e3, 1024) == GPU_TOKEN_BUDGET
    assert token_budget(1e9, 400e3, 1024) == 2000
    assert token_budget(1e6, 400e3, 1024) == 1024, "a passage must fit in any case"


def test_one_passage_that_does_not_fit_is_an_error(encoder, monkeypatch):
    def no_memory(self, ids, packed):
        raise torch.OutOfMemoryError("pretend")

    monkeypatch.setattr(PackedForward, "__call__", no_memory)
    monkeypatch.setattr(encoder, "token_budget", encoder.token_budget)  # other tests share it
    with pytest.raises(torch.OutOfMemoryError):
        encoder.encode(["a", "b"])


def test_states_leave_the_device_as_the_store_keeps_them(encoder):
    tokens = encoder.tokenise(make_texts(8, seed=6))
    exact, fits = encoder.start(tokens, ratio=4)[0].result()
    assert fits.all()
    highest = [np.abs(passage.states).max() for passage in exact.unpack(4)]
    limit = float(np.median(highest))
    halved, fits = encoder.start(tokens, ratio=4, dtype=torch.float16, limit=limit)[0].result()
    assert np.array_equal(halved.states, exact.states.astype(np.float16), equal_nan=True)
    assert fits.tolist() == [high <= limit for high in highest]
    some = halved.select(fits, 4).unpack(4)
    assert [p.num_tokens for p in some] == halved.num_tokens[fits].tolist()
    for passage, i in zip(some, np.flatnonzero(fits), strict=True):
        assert np.array_equal(passage.states, halved.unpack(4)[i].states)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_states_are_close_to_those_of_the_cpu(encoder, model_dir):
    texts = make_texts(20, seed=8)
    gpu = PassageEncoder(str(model_dir), device="cuda").encode(texts)
    for got, want in zip(gpu, encoder.encode(texts), strict=True):
        cosine = (got.states * want.states).sum(1) / (
            np.linalg.norm(got.states, axis=1) * np.linalg.norm(want.states, axis=1)
        )
        assert cosine.min() > 0.99


def test_the_clock_of_a_batch_adds_up(encoder):
    began = time.perf_counter()
    first, second = (
        encoder.start(encoder.tokenise([text]), ratio=4)[0] for text in make_texts(2, seed=2)
    )
    elapsed = time.perf_counter() - began
    assert list(second.seconds) == ["idle", "forward", "pool"]
    spent = [*first.seconds.values(), *second.seconds.values()][1:]
    assert all(seconds > 0 for seconds in spent)
    assert sum(spent) <= elapsed
