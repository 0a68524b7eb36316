"""Parts of a T5Gemma2 layer that both halves compute, with fewer passes over memory than its own.

They work token by token on packed rows, (n, d), read the weights of the layer's modules and give
the same values up to rounding. What is left between two parts is attention. On a GPU the parts go
through torch.compile, which fuses all that lies between two matrix products into one kernel: a GPU
that runs them operation by operation spends most of its time on moving memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn.functional import embedding, gelu

logger = logging.getLogger(__name__)


class Parts(NamedTuple):
    """The parts of a layer, as they are or fused."""

    before: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    keys_values: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    after: Callable[..., torch.Tensor]


@cache
def parts(*, fuse: bool) -> Parts:
    """Return `before_attention`, `keys_values` and `after_attention`, fused if that is wanted.

    All models of a process share the fused ones: one small graph per part does for every layer and
    every number of rows.
    """
    plain = Parts(before_attention, keys_values, after_attention)
    return Parts(*(_Fused(part) for part in plain)) if fuse else plain


class _Fused:
    """A function that is compiled at its first call, or runs as it is where that is impossible."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._run = torch.compile(function, dynamic=True)

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self._run(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            logger.warning(
                "torch cannot compile on this machine, so that the GPU runs at less than half of "
                "its speed. Triton needs a C compiler and the headers of Python: %s",
                str(error).strip().split("\n")[0],
            )
            self._run = self._function
            return self._function(*arguments)


def embed(module: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return (…, d) of (…) ids as T5Gemma2TextScaledWordEmbedding does, but without a host sync."""
    embedded = embedding(ids, module.weight) * module.embed_scale.to(module.weight.dtype)
    special = (ids == module.eoi_token_index).unsqueeze(-1)
    return torch.where(special, module.eoi_embedding.to(embedded.dtype), embedded)


def before_attention(
    layer: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the rotated queries and keys and the values of a layer.

    Args:
        layer: The layer.
        hidden: Its input, (n, d).
        cos: Cosines of the rows' positions, (n, 1, head_dim).
        sin: Sines of the rows' positions, (n, 1, head_dim).

    Returns:
        (n, heads, head_dim) queries, and (n, kv heads, head_dim) keys and values.
    """
    normed = norm(layer.pre_self_attn_layernorm, hidden)
    key, value = keys_values(layer.self_attn, normed)
    return rotate(queries(layer.self_attn, normed), cos, sin), rotate(key, cos, sin), value


def queries(attention: Any, rows: torch.Tensor) -> torch.Tensor:
    """Return the queries, not rotated, of (n, d): (n, heads, head_dim)."""
    query = attention.q_proj(rows).view(len(rows), -1, attention.head_dim)
    return norm(attention.q_norm, query)


def keys_values(attention: Any, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys, not rotated, and the values of (n, d): (n, kv heads, head_dim) each."""
    shape = (len(rows), -1, attention.head_dim)
    key = norm(attention.k_norm, attention.k_proj(rows).view(shape))
    return key, attention.v_proj(rows).view(shape)


def after_attention(layer: Any, hidden: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Return the layer's output, (n, d), from its input and what its heads saw, flattened."""
    attended = layer.self_attn.o_proj(seen)
    hidden = hidden + norm(layer.post_self_attn_layernorm, attended)
    fed = feed_forward(layer.mlp, norm(layer.pre_feedforward_layernorm, hidden))
    return hidden + norm(layer.post_feedforward_layernorm, fed)


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


def rotary_parts(
    model: Any, hidden: torch.Tensor, positions: torch.Tensor
) -> dict[str, list[torch.Tensor]]:
    """Return the cosines and sines of (n,) positions by kind of layer, (n, 1, head_dim) each."""
    return {
        kind: [part.transpose(0, 1) for part in model.rotary_emb(hidden, positions[None], kind)]
        for kind in set(model.config.layer_types)
    }


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions to (…, head_dim); cos and sin broadcast against it."""
    half = states.shape[-1] // 2
    if torch.compiler.is_compiling():  # one kernel: in place it would become three
        left, right = states[..., :half], states[..., half:]
        turned = torch.cat((-right, left), dim=-1)
        return states * cos + turned * sin
    turned = states * cos
    turned[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return turned
