"""Parts of a T5Gemma2 layer that both halves compute, with fewer passes over memory than its own.

They read the weights of the layer's modules and give the same values up to float32 rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import gelu


def feed_forward(mlp: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return down(gelu(gate) * up) of (…, d), with one temporary less than T5Gemma2MLP."""
    gated = gelu(mlp.gate_proj(hidden), approximate="tanh").mul_(mlp.up_proj(hidden))
    fed: torch.Tensor = mlp.down_proj(gated)
    return fed


def norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return the RMS norm of (…, d), computed in float32 as T5Gemma2RMSNorm does."""
    wide = hidden.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = torch.rsqrt(length.square() / wide.shape[-1] + module.eps)
    return (wide * scale).mul_(1.0 + module.weight.float()).type_as(hidden)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions to (…, head_dim); cos and sin broadcast against it."""
    half = states.shape[-1] // 2
    turned = states * cos
    turned[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return turned
