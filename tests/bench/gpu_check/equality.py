"""Our forward is as exact as the model's own, and flash attention as exact as plain products."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from kalm_encoder.model.batching import Packed
from kalm_encoder.model.encoder_attention import attend_blocks, attend_flash, attend_padded
from kalm_encoder.model.encoder_forward import PackedForward
from tests.bench.forwards import own_forward, random_encoder
from tests.bench.gpu_check.device import CUDA, DEVICE, HALF, Setting, median_ms, say


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the norm of the difference over that of b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def check_equality(setting: Setting) -> list[str]:
    """Ours may be no farther from transformers in float64 than transformers itself is.

    transformers in float32 is no measure on a GPU: on an H100 with torch 2.11 its own states of a
    passage of 257 tokens, an odd width of the mask, were 2e-3 off, ours 1e-6.
    """
    name, dimensions = next(iter(setting.sizes.items()))
    full = random_encoder(dimensions, setting.tokenizer, DEVICE, torch.float32)
    exact, half = copy.deepcopy(full).double(), copy.deepcopy(full).to(HALF)
    # Both are computed in float32 by the published code as well.
    half.rotary_emb, half.embed_tokens.embed_scale = full.rotary_emb, full.embed_tokens.embed_scale
    for lengths in ([1, 5, 90, 255, 256, 257], [513, 700, 1024, 3], [1024] * 4, [80] * 64):
        if setting.toy:
            lengths = [min(n, 130) for n in lengths][:6]
        ids = torch.randint(10, 6000, (sum(lengths),), device=DEVICE)
        want = _flat_states(exact, ids, lengths)
        theirs = [relative(_flat_states(model, ids, lengths), want) for model in (full, half)]
        with torch.inference_mode():
            packed = Packed(lengths, ids.device)
            # PackedForward packs the weights of a CPU model in place: a copy for the toy run.
            wide = PackedForward(full if CUDA else copy.deepcopy(full), fuse=False)(ids, packed)
            plain = PackedForward(half, fuse=False)(ids, packed)
            fused = PackedForward(half)(ids, packed) if CUDA else plain
        ours = [relative(states, want) for states in (wide, plain, fused)]
        say(
            f"equality {name} {lengths[:6]}: float32 ours {ours[0]:.1e} theirs {theirs[0]:.1e} | "
            f"bfloat16 ours {ours[1]:.2e} fused {ours[2]:.2e} theirs {theirs[1]:.2e}, "
            f"ours over theirs {ours[1] / theirs[1]:.2f}, fused {ours[2] / theirs[1]:.2f} (<=1.2)"
        )
    return []


def _flat_states(model: Any, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return (T, d) states of the model's own forward, without padding."""
    hidden, mask = own_forward(model, [part.tolist() for part in ids.split(list(lengths))])
    return hidden[mask.bool()]


def check_attention(setting: Setting) -> list[str]:
    """Time flash attention of one layer on 65,536 tokens and compare it with blocks."""
    if not CUDA:
        say("attention: no CUDA device")
        return []
    shapes = ((4, 1, 512, 80), (4, 1, 512, 1024), (4, 1, None, 1024), (8, 4, 1024, 128))
    for heads, kv, window, length in shapes:
        lengths = [length] * (65536 // length)
        packed, few = (Packed(some, DEVICE) for some in (lengths, lengths[:32]))
        q, k, v = (
            torch.randn(sum(lengths), h, 256, device=DEVICE, dtype=HALF) for h in (heads, kv, kv)
        )
        took, padded = (
            median_ms(partial(attend, q, k, v, packed, 1 / 16, window))
            for attend in (attend_flash, attend_padded)
        )
        some = [x[: sum(few.lengths)] for x in (q, k, v)]
        flash = attend_flash(*some, few, 1 / 16, window)
        blocks = attend_blocks(*(x.float() for x in some), few, 1 / 16, window)
        flops = 4 * heads * 256 * sum(min(n, window or n) * n for n in lengths)
        say(
            f"attention h{heads}/{kv} window {window} length {length}: {took:.3f} ms, "
            f"{flops / took / 1e9:.0f} TFLOP/s, error {relative(flash, blocks):.1e} (<1e-2); "
            f"padded {padded:.2f} ms"
        )
    return []
