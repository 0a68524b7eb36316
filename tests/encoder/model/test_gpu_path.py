"""What a GPU runs, without a GPU: both forwards on meta tensors, where no value can be read."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kalm_encoder.model import checkpoint, encoder_attention, in_flight
from kalm_encoder.model.batching import Packed, make_batches
from kalm_encoder.model.decoder import GPU_TOKEN_BUDGET
from kalm_encoder.model.decoder_forward import KeptMemory, PassageMemory, last_hidden
from kalm_encoder.model.encoder_forward import PackedForward
from kalm_encoder.model.layers import parts
from kalm_encoder.model.pooling import pool_packed, within
from pipeline.estimate.flops import MODELS
from tests.bench.forwards import ms_marco_lengths, random_decoder, random_encoder

META = torch.device("meta")
PRODUCTS = ("mm", "addmm", "bmm", "linear")


class Watch(TorchDispatchMode):
    """Notes the dtypes of products and every operation that mixes devices."""

    def __init__(self):
        super().__init__()
        self.mixed, self.products, self.names = [], set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self.names.append(str(func))
        if len({x.device.type for x in tensors if x.dim()}) > 1:
            self.mixed.append(str(func))
        if str(func).split(".")[1] in PRODUCTS:
            self.products |= {x.dtype for x in tensors}
        return result


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.resolve(checkpoint.DEMO_NAME).tokenizer()


@pytest.mark.parametrize("size", MODELS)
def test_the_encoder_reads_no_value_on_the_host_and_mixes_no_devices(size, tokenizer):
    model = random_encoder(MODELS[size], tokenizer, META, torch.bfloat16)
    forward = PackedForward(model, fuse=False)
    forward._attend = encoder_attention.attend_flash
    packed = Packed([128, 3, 700], META)
    with torch.inference_mode(), Watch() as watch:
        hidden = forward(torch.zeros(831, dtype=torch.long, device=META), packed)
        pooled = pool_packed(hidden, packed, 4)
        assert within(pooled, 65504.0).shape == pooled.half().shape[:1]
    assert pooled.shape == (32 + 1 + 175, MODELS[size].hidden)
    assert not watch.mixed
    assert watch.products == {torch.bfloat16}
    assert sum("varlen_attn" in name for name in watch.names) == MODELS[size].layers


@pytest.mark.parametrize("size", MODELS)
@pytest.mark.parametrize("kept", [False, True])
def test_the_decoder_reads_no_value_on_the_host_and_mixes_no_devices(size, kept, tokenizer):
    dimensions = MODELS[size]
    model = random_decoder(dimensions, tokenizer, META, torch.bfloat16)
    real = torch.ones((3, 20), dtype=torch.bool, device=META)
    if kept:
        shape = (3, 20, dimensions.layers, 2, dimensions.kv_heads, dimensions.head_dim)
        memory = KeptMemory(torch.zeros(shape, dtype=torch.bfloat16, device=META), 8, real)
    else:
        states = torch.zeros((3, 20, dimensions.hidden), dtype=torch.bfloat16, device=META)
        memory = PassageMemory(states, real)
    prompts = torch.zeros((1, 30), dtype=torch.long, device=META)
    with torch.inference_mode(), Watch() as watch:
        hidden, _ = last_hidden(model, prompts, memory)
    assert hidden.shape == (3, dimensions.hidden)
    assert not watch.mixed
    assert torch.bfloat16 in watch.products
    assert not any("nonzero" in name or "_local_scalar" in name for name in watch.names)


def test_a_hundred_candidates_are_one_forward_of_a_gpu():
    sizes = [-(-n // 4) for n in ms_marco_lengths(100)]
    assert len(make_batches(sizes, GPU_TOKEN_BUDGET, overhead=98, max_padding=1.0)) == 1


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "reason"),
    [
        ((9, 0), torch.bfloat16, 256, None),
        ((8, 0), torch.float16, 48, None),
        ((7, 5), torch.float16, 64, "older than Ampere"),
        ((9, 0), torch.float32, 64, "dtype is torch.float32"),
        ((9, 0), torch.bfloat16, 288, "288 dimensions"),
    ],
)
def test_a_gpu_without_flash_attention_says_why(
    capability, dtype, head_dim, reason, monkeypatch, caplog
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    weight = SimpleNamespace(
        device=torch.device("cuda"), dtype=dtype, element_size=lambda: dtype.itemsize
    )
    with caplog.at_level(logging.WARNING):
        chosen = encoder_attention.choose_attention(weight, head_dim)
    flash = reason is None
    assert chosen is (encoder_attention.attend_flash if flash else encoder_attention.attend_padded)
    assert flash or reason in caplog.text


@pytest.mark.parametrize(("hardware", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_that_emulates_bfloat16_computes_in_float32(hardware, dtype, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: hardware or including_emulation
    )
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.device("cpu"))
    assert checkpoint.choose_dtype(None, torch.device("cuda:0")) == dtype


def test_a_mark_is_set_on_the_stream_of_the_device_that_works(monkeypatch):
    recorded = []
    event = SimpleNamespace(record=recorded.append)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    assert in_flight.mark(torch.device("cuda:1")) is event
    assert recorded == ["stream of cuda:1"]


def test_without_a_compiler_the_parts_run_as_they_are_and_say_so(monkeypatch, caplog):
    def no_compiler(function, dynamic):
        def fail(*_):
            raise torch._dynamo.exc.TorchDynamoException("Failed to find C compiler")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    parts.cache_clear()
    try:
        attention = SimpleNamespace(
            head_dim=4,
            k_norm=SimpleNamespace(eps=1e-6, weight=torch.zeros(4)),
            k_proj=torch.nn.Linear(6, 8),
            v_proj=torch.nn.Linear(6, 8),
        )
        rows = torch.randn(5, 6)
        with caplog.at_level(logging.WARNING):
            found = [parts(fuse=True).keys_values(attention, rows) for _ in range(2)]
    finally:
        parts.cache_clear()
    plain = parts(fuse=False).keys_values(attention, rows)
    for pair in found:
        for got, want in zip(pair, plain, strict=True):
            torch.testing.assert_close(got, want)
    assert caplog.text.count("cannot compile") == 1
    assert "Failed to find C compiler" in caplog.text
