"""The packed forward equals the model's own padded one, whatever the lengths and the window."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from kalm_encoder import PassageEncoder
from kalm_encoder.model import checkpoint, encoder_attention, onednn
from kalm_encoder.model.batching import Packed
from kalm_encoder.model.encoder_attention import (
    BLOCK_QUERIES,
    attend_blocks,
    attend_flash,
    attend_padded,
    reach,
)
from kalm_encoder.model.encoder_forward import PackedForward
from kalm_encoder.model.layers import parts
from kalm_encoder.model.onednn import PackedLinear, packable, products

TOLERANCE = 2e-5


def load(model_dir, *, dtype=torch.float32, **changes):
    """The raw text encoder; its window and heads may be changed, as no weight depends on them."""
    model = checkpoint.resolve(str(model_dir)).load_text_encoder(torch.device("cpu"), dtype)
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


@pytest.fixture(scope="module")
def plain(model_dir):
    return load(model_dir)


@pytest.fixture(scope="module", params=["MKL", "oneDNN"])
def packed(request, model_dir):
    """Products by each library, whichever this CPU would take."""
    wanted = request.param == "oneDNN"
    if wanted and not onednn.AVAILABLE:
        pytest.skip("no oneDNN here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "FASTER", wanted)
        yield PackedForward(load(model_dir))


def random_ids(lengths, seed=0):
    return torch.randint(10, 5000, (sum(lengths),), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def padded(model, ids, lengths):
    """(T, d) by the model's own forward on a padded batch."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    batch = torch.zeros(mask.shape, dtype=torch.long)
    batch[mask] = ids
    return model(input_ids=batch, attention_mask=mask).last_hidden_state[mask]


@torch.inference_mode()
def run(forward, ids, lengths):
    return forward(ids, Packed(lengths, ids.device))


@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_lengths_give_what_the_padded_forward_gives(plain, packed, lengths, seed):
    ids = random_ids(lengths, seed)
    got, want = run(packed, ids, lengths), padded(plain, ids, lengths)
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("window", [1, 2, 3, 64, 65, 2 * BLOCK_QUERIES, 512, 513])
@pytest.mark.parametrize("length", [1, BLOCK_QUERIES - 1, BLOCK_QUERIES, BLOCK_QUERIES + 1, 700])
def test_a_sliding_layer_sees_exactly_its_window(model_dir, window, length):
    model = load(model_dir, sliding_window=window)
    ids = random_ids([length])
    want = padded(model, ids, [length])
    torch.testing.assert_close(
        run(PackedForward(model), ids, [length]), want, atol=TOLERANCE, rtol=0
    )


def test_a_token_out_of_reach_changes_nothing_in_a_sliding_layer(model_dir):
    model = load(model_dir, layer_types=["sliding_attention"] * 3, num_hidden_layers=3)
    del model.layers[1:]
    ids = random_ids([400])
    forward = PackedForward(model)
    before = run(forward, ids, [400])
    left, right = reach(model.config.sliding_window)
    ids[200] = (ids[200] + 1) % 5000
    changed = (run(forward, ids, [400]) != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == list(range(200 - right, 200 + left + 1))


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_several_key_heads(model_dir, kv_heads):
    config = copy.deepcopy(checkpoint.resolve(str(model_dir)).config.encoder.text_config)
    config.num_attention_heads, config.num_key_value_heads = 4, kv_heads
    torch.manual_seed(0)
    model = type(load(model_dir))(config, 5000).eval().requires_grad_(False)
    lengths = [3, 150, 70]
    ids = random_ids(lengths)
    want = padded(model, ids, lengths)
    got = run(PackedForward(model), ids, lengths)
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


def test_sixteen_bit_states_are_as_close_to_float32_as_those_of_the_padded_forward(
    model_dir, plain
):
    model = load(model_dir, dtype=torch.bfloat16)
    lengths = [100, 40, 7]
    ids = random_ids(lengths)
    right = padded(plain, ids, lengths)

    def away(states):
        return (states.float() - right).square().mean().sqrt()

    theirs = away(padded(model, ids, lengths))
    assert 0 < away(run(PackedForward(model), ids, lengths)) < 1.2 * theirs


def test_the_end_of_image_token_has_an_embedding_of_its_own(model_dir):
    models = load(model_dir), load(model_dir)
    for model in models:
        torch.nn.init.constant_(model.embed_tokens.eoi_embedding, 0.5)
    ids = random_ids([12])
    ids[5] = models[0].embed_tokens.eoi_token_index
    want = padded(models[0], ids, [12])
    torch.testing.assert_close(
        run(PackedForward(models[1]), ids, [12]), want, atol=TOLERANCE, rtol=0
    )


def test_weights_are_packed_and_not_kept_twice(model_dir, packed):
    model = packed.model
    if not packable(model.embed_tokens.weight):
        assert any(name.endswith("proj.weight") for name in model.state_dict())
        return
    projections = [m for m in model.layers.modules() if hasattr(m, "out_features")]
    assert len(projections) == 7 * len(model.layers)
    assert all(isinstance(m, PackedLinear) for m in projections)
    assert not any(name.endswith("proj.weight") for name in model.state_dict())


@given(h=st.integers(1, 2), n=st.integers(1, 70), m=st.integers(1, 70), k=st.integers(1, 300))
def test_products_are_those_of_torch(h, n, m, k):
    draw = torch.Generator().manual_seed(n * m + k)
    x = torch.randn(h, n, k, generator=draw)
    weight = torch.randn(h, k, m, generator=draw).transpose(1, 2)
    want = x @ weight.transpose(1, 2)
    torch.testing.assert_close(products(x, weight), want, atol=1e-4, rtol=1e-5)


def test_two_small_graphs_do_for_all_layers_and_lengths(model_dir, plain, monkeypatch):
    # A pool of compilers would start interpreters that import torch, for two graphs.
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    torch._dynamo.reset()
    parts.cache_clear()
    counters.clear()
    forward = PackedForward(load(model_dir), fuse=True)
    for lengths in ([5, 90], [30], [2], [64] * 8, [200, 3, 17]):
        ids = random_ids(lengths)
        torch.testing.assert_close(
            run(forward, ids, lengths), padded(plain, ids, lengths), atol=TOLERANCE, rtol=0
        )
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 64, 65])
def test_attention_of_padded_passages_equals_the_products(window, kv_heads):
    packed = Packed([1, 32, 33, 34, 64, 65, 300, 3], torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(sum(packed.lengths), heads, 48, generator=draw)
        for heads in (4, kv_heads, kv_heads)
    )
    got, want = (
        attend(query, key, value, packed, 0.125, window)
        for attend in (attend_padded, attend_blocks)
    )
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


def test_products_get_no_rows_with_gaps(monkeypatch):
    """Rows with gaps, as those of one of several key heads, send oneDNN to its slowest kernel."""
    strides = []

    def noted(x, weight):
        strides.append((x.stride(), weight.stride(), weight.shape))
        return products(x, weight)

    monkeypatch.setattr(encoder_attention, "products", noted)
    packed = Packed([70, 200], torch.device("cpu"))
    parts_of = [torch.randn(270, heads, 48) for heads in (8, 4, 4)]
    attend_blocks(*parts_of, packed, 0.125, 64)
    assert strides
    for x, weight, shape in strides:
        assert x[2] == 1
        assert weight[1:] in ((shape[2], 1), (1, shape[1])), "rows lie together, or columns do"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("window", [None, 64, 65])
def test_flash_attention_equals_the_products_on_a_gpu(window):
    lengths = [1, 32, 33, 34, 64, 65, 300]
    packed = Packed(lengths, torch.device("cuda"))
    draw = [torch.randn(sum(lengths), heads, 64, device="cuda") for heads in (4, 1, 1)]
    query, key, value = (part.bfloat16() for part in draw)
    got = attend_flash(query, key, value, packed, 0.125, window)
    want = attend_blocks(*draw, packed, 0.125, window)
    torch.testing.assert_close(got.float(), want, atol=3e-2, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_batch_is_started_without_waiting_for_the_gpu(model_dir):
    encoder = PassageEncoder(str(model_dir), device="cuda")
    tokens = encoder.tokenise(["a passage of few words"] * 8)
    encoder.encode_batch(tokens, ratio=4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoder.start(tokens, ratio=4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
