"""The text encoder's forward over packed passages, without padding.

The tokens of a batch lie one behind the other, (T, d), so that what works token by token does no
needless work. Attention runs passage by passage: without a mask if a layer sees the whole passage,
and block by block over the tokens in reach in the sliding layers of longer passages. On a GPU in
16 bit, torch's variable-length flash attention does both. The result equals that of the model's own
padded forward up to float32 rounding (tests/encoder/model/test_encoder_forward.py).
"""

from __future__ import annotations

from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch.nn.functional import embedding

from kalm_encoder.errors import CheckpointError
from kalm_encoder.model.batching import Packed
from kalm_encoder.model.layers import feed_forward, norm, rotate
from kalm_encoder.model.onednn import pack_linears, product

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None  # type: ignore[assignment]

BLOCK_QUERIES = 128
"""Number of queries of a sliding layer that are computed together. A larger block needs fewer
products, but masks more keys: up to BLOCK_QUERIES - 1 for each query."""


class PackedForward:
    """The forward of one text encoder.

    Args:
        model: A T5Gemma2TextEncoder in eval mode. On a CPU the weights of its layers are packed for
            oneDNN: its own forward still works, but its state_dict no longer holds them.
        compile: Whether the parts between the attentions go through torch.compile. Two small graphs
            serve all layers and lengths; they are compiled in the first forward.

    Raises:
        CheckpointError: If the model caps attention logits.
    """

    def __init__(self, model: Any, *, compile: bool = False) -> None:
        if model.config.attn_logit_softcapping is not None:
            raise CheckpointError(
                f"attn_logit_softcapping {model.config.attn_logit_softcapping}: the encoder of a "
                "KaLM reranker caps no logits, and capping is not built"
            )
        self.model = model
        self._before = torch.compile(_before, dynamic=True) if compile else _before
        self._after = torch.compile(_after, dynamic=True) if compile else _after
        if not compile:
            pack_linears(model.layers)
        flash = _has_flash(model.embed_tokens.weight)
        self._attend = _attend_varlen if flash else _attend_blocks

    def __call__(self, ids: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Return the (T, d) last hidden states, after the final norm.

        Args:
            ids: Token ids of all passages one behind the other, (T,) int64 on the device.
            packed: Where each passage lies.
        """
        model, config = self.model, self.model.config
        hidden = _embed(model.embed_tokens, ids)
        positions = packed.positions[None]
        rotary = {
            kind: [part.transpose(0, 1) for part in model.rotary_emb(hidden, positions, kind)]
            for kind in set(config.layer_types)
        }
        for kind, layer in zip(config.layer_types, model.layers, strict=False):
            attention = layer.self_attn
            query, key, value = self._before(layer, hidden, *rotary[kind])
            window = config.sliding_window if kind == "sliding_attention" else None
            seen = self._attend(query, key, value, packed, attention.scaling, window)
            hidden = self._after(layer, hidden, seen.flatten(1))
        return norm(model.norm, hidden)


def _has_flash(weight: torch.Tensor) -> bool:
    """Return whether flash attention with lengths and a window works on this device and dtype."""
    return (
        weight.device.type == "cuda"
        and weight.element_size() == 2
        and torch.cuda.get_device_capability(weight.device) >= (8, 0)
        and varlen_attn is not None
        and {"window_size", "enable_gqa"} <= signature(varlen_attn).parameters.keys()
    )


def _embed(module: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return (T, d) as T5Gemma2TextScaledWordEmbedding does, but without waiting for a GPU."""
    embedded = embedding(ids, module.weight) * module.embed_scale.to(module.weight.dtype)
    special = (ids == module.eoi_token_index).unsqueeze(1)
    return torch.where(special, module.eoi_embedding.to(embedded.dtype), embedded)


def _before(
    layer: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the rotated queries and keys and the values, (T, heads, head_dim) each."""
    attention = layer.self_attn
    normed = norm(layer.pre_self_attn_layernorm, hidden)
    heads = (len(hidden), -1, attention.head_dim)
    query = norm(attention.q_norm, attention.q_proj(normed).view(heads))
    key = norm(attention.k_norm, attention.k_proj(normed).view(heads))
    value = attention.v_proj(normed).view(heads)
    return rotate(query, cos, sin), rotate(key, cos, sin), value


def _after(layer: Any, hidden: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Return the layer's output, (T, d), from its input and what its heads saw, flattened."""
    attended = layer.self_attn.o_proj(seen)
    hidden = hidden + norm(layer.post_self_attn_layernorm, attended)
    fed = feed_forward(layer.mlp, norm(layer.pre_feedforward_layernorm, hidden))
    return hidden + norm(layer.post_feedforward_layernorm, fed)


def reach(window: int) -> tuple[int, int]:
    """Return how many tokens to the left and to the right a sliding layer of the encoder sees.

    Example: A window of 512 sees 255 tokens to the left and 256 to the right, as in transformers'
    `sliding_window_mask_function(…, is_causal=False)`.
    """
    return (window + 1) // 2 - 1, window // 2


def _attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: Packed,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Compute attention with torch's variable-length flash attention; see `_attend_blocks`."""
    starts, longest = packed.starts, max(packed.lengths)
    seen = varlen_attn(
        *(query, key, value, starts, starts, longest, longest),
        scale=scale,
        window_size=(-1, -1) if window is None else reach(window),
        enable_gqa=True,
    )
    assert isinstance(seen, torch.Tensor)  # it is a pair only with return_aux
    return seen


def _attend_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: Packed,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Compute attention as plain matrix products, passage by passage.

    The query heads of one key head are laid out as if they were positions, so that keys and values
    are never repeated and the products are large.

    Args:
        query: (T, heads, head_dim).
        key: (T, kv heads, head_dim).
        value: (T, kv heads, head_dim).
        packed: Where the passages lie.
        scale: Factor of the products.
        window: Window of a sliding layer. None shows the whole passage to each token.

    Returns:
        (T, heads, head_dim).
    """
    query = query * scale
    seen = torch.empty_like(query)
    groups = query.shape[1] // key.shape[1]
    start = 0
    for length in packed.lengths:
        for first, last, begin, end, hidden in _blocks(length, window, query.device):
            rows = slice(start + first, start + last)
            columns = slice(start + begin, start + end)
            for head in range(key.shape[1]):
                heads = slice(head * groups, (head + 1) * groups)
                asked = query[rows, heads].reshape(-1, query.shape[2])
                scores = product(asked, key[columns, head])
                if hidden is not None:
                    masked = scores.view(last - first, groups, -1)
                    masked.masked_fill_(hidden.unsqueeze(1), -torch.inf)
                weights = torch.softmax(scores, dim=1, dtype=torch.float32).type_as(value)
                found = product(weights, value[columns, head].T)
                seen[rows, heads] = found.view(last - first, groups, -1)
        start += length
    return seen


@lru_cache(maxsize=64)
def _blocks(
    length: int, window: int | None, device: torch.device
) -> list[tuple[int, int, int, int, torch.Tensor | None]]:
    """Cut the attention of one passage into blocks of queries and the keys in their reach.

    Returns:
        For each block the first and last query, the first and last key (each last is exclusive),
        and a (queries, keys) bool tensor of what is hidden, or None if nothing is.
    """
    left, right = (length, length) if window is None else reach(window)
    if length <= min(left, right) + 1:
        return [(0, length, 0, length, None)]
    blocks: list[tuple[int, int, int, int, torch.Tensor | None]] = []
    for first in range(0, length, BLOCK_QUERIES):
        last = min(first + BLOCK_QUERIES, length)
        begin, end = max(0, first - left), min(length, last + right)
        distance = torch.arange(first, last, device=device)[:, None]
        distance = distance - torch.arange(begin, end, device=device)
        blocks.append((first, last, begin, end, (distance > left) | (-distance > right)))
    return blocks
