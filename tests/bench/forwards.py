"""What benchmarks of a forward share: random models and lengths, and the model's own forward.

It imports torch and transformers and nothing that a machine with only these lacks, so that the GPU
check runs there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.t5gemma2.modeling_t5gemma2 import (
    T5Gemma2Decoder,
    T5Gemma2RotaryEmbedding,
    T5Gemma2TextEncoder,
)

from jobs.demo_training.architecture import configuration
from kalm_encoder.model.checkpoint import Checkpoint, Device, Dtype
from kalm_encoder.model.pooling import mean_pool
from pipeline.estimate.flops import Dimensions

RATIO = 4


def ms_marco_lengths(count: int, *, seed: int = 0) -> list[int]:
    """Return log-normal token lengths with a mean of about 80, as MS MARCO passages have."""
    rng = random.Random(seed)
    return [max(12, min(300, round(rng.lognormvariate(4.28, 0.45)))) for _ in range(count)]


def random_encoder(
    dimensions: Dimensions, tokenizer: Any, device: torch.device, dtype: torch.dtype
) -> T5Gemma2TextEncoder:
    """Build a text encoder with random weights in the device's own memory."""
    config = configuration(dimensions, tokenizer)
    with torch.device("meta"):
        model = T5Gemma2TextEncoder(config.encoder.text_config, config.eoi_token_index)
    return _filled(model, device, dtype)


def random_decoder(
    dimensions: Dimensions, tokenizer: Any, device: torch.device, dtype: torch.dtype
) -> T5Gemma2Decoder:
    """Build a decoder with random weights in the device's own memory."""
    config = configuration(dimensions, tokenizer)
    with torch.device("meta"):
        model = T5Gemma2Decoder(config.decoder, config.eoi_token_index)
    return _filled(model, device, dtype)


def _filled(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Give a model from the meta device random weights and its two buffers."""
    model = model.to(dtype).to_empty(device=device)
    for name, parameter in model.named_parameters():
        # Gemma's norms multiply by 1 + weight.
        torch.nn.init.normal_(parameter, std=0.0 if "norm" in name else 0.02)
    model.rotary_emb = T5Gemma2RotaryEmbedding(model.config).to(device)
    embedding = model.embed_tokens
    embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=device)
    return model.requires_grad_(False).eval()


@torch.inference_mode()
def own_forward(model: Any, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the model's own forward on padded passages; return (b, n, d) states and (b, n) mask."""
    rows = [torch.tensor(row, device=model.device) for row in ids]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    ones = [torch.ones_like(row) for row in rows]
    mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True)
    return model(input_ids=input_ids, attention_mask=mask).last_hidden_state, mask


def plain_states(model: Any, ids: Sequence[Sequence[int]]) -> np.ndarray:
    """Return (b, m, d) pooled states from the model's own forward over token ids."""
    return mean_pool(*own_forward(model, ids), RATIO).cpu().numpy()


def in_memory(model: Any, tokenizer: Any) -> Checkpoint:
    """Return a checkpoint whose only half is this model: random weights have no files."""

    class InMemory(Checkpoint):
        fingerprint = "x"

        def tokenizer(self) -> Any:
            return tokenizer

        def load_text_encoder(self, device: Device, dtype: Dtype) -> Any:
            return model

        load_decoder = load_text_encoder

    return InMemory(Path(), "random", None)
