"""The decoder's forward for one prompt and many passages, with every saving that is exact.

All rows share the prompt, and only the last position is read. So the first layer projects the
prompt once for all rows, the last layer computes queries, output and feed-forward for the last
position alone, and the mask has one row a passage only where lengths differ. The layers' own
modules and weights are used; what they compute is T5Gemma2's merged attention (self and cross in
one softmax, keys and values of both from the same projections).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.t5gemma2.modeling_t5gemma2 import apply_rotary_pos_emb


def last_hidden(
    model: Any, prompt: torch.Tensor, passages: torch.Tensor, real: torch.Tensor
) -> torch.Tensor:
    """Run the decoder and return its final hidden state at the last prompt position.

    Args:
        model: a T5Gemma2Decoder in eval mode.
        prompt: (1, p) token ids.
        passages: (b, m, d) states.
        real: (b, m) bool, False for padding.

    Returns:
        (b, d) after the final norm.
    """
    config = model.config
    hidden = model.embed_tokens(prompt)  # (1, p, d) until the first attention
    positions = torch.arange(prompt.shape[1], device=prompt.device).unsqueeze(0)
    kinds = set(config.layer_types)
    rotary = {kind: model.rotary_emb(hidden, positions, kind) for kind in kinds}
    masks = _masks(config, prompt.shape[1], real, kinds)
    layers = model.layers[: config.num_hidden_layers]
    for i, layer in enumerate(layers):
        kind = config.layer_types[i]
        only_last = i == len(layers) - 1
        normed = layer.pre_self_attn_layernorm(hidden)
        attended = _attend(layer.self_attn, normed, rotary[kind], masks[kind], passages, only_last)
        if only_last:
            hidden = hidden[:, -1:]
        hidden = hidden + layer.post_self_attn_layernorm(attended)
        fed = layer.mlp(layer.pre_feedforward_layernorm(hidden))
        hidden = hidden + layer.post_feedforward_layernorm(fed)
    final: torch.Tensor = model.norm(hidden)[:, -1]
    return final


def _attend(
    attention: Any,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    passages: torch.Tensor,
    only_last: bool,
) -> torch.Tensor:
    """Return (b, p or 1, d): attention over the prompt so far and the passage, in one softmax.

    Args:
        attention: the layer's T5Gemma2MergedAttention.
        hidden: (1 or b, p, d), normed.
        rotary: cos and sin, (1, p, head_dim).
        mask: (1 or b, 1, p, p + m) bool.
        passages: (b, m, d).
        only_last: compute the last position alone.
    """
    b = len(passages)
    heads = (*hidden.shape[:2], -1, attention.head_dim)
    query = attention.q_norm(attention.q_proj(hidden).view(heads).transpose(1, 2))
    key = attention.k_norm(attention.k_proj(hidden).view(heads).transpose(1, 2))
    value = attention.v_proj(hidden).view(heads).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    if only_last:
        query, mask = query[:, :, -1:], mask[:, :, -1:]
    heads = (*passages.shape[:2], -1, attention.head_dim)
    cross_key = attention.k_norm(attention.k_proj(passages).view(heads).transpose(1, 2))
    cross_value = attention.v_proj(passages).view(heads).transpose(1, 2)
    groups = attention.num_key_value_groups
    out = scaled_dot_product_attention(
        query.expand(b, -1, -1, -1),
        _join(key, cross_key, groups),
        _join(value, cross_value, groups),
        attn_mask=mask,
        scale=attention.scaling,
    )
    projected: torch.Tensor = attention.o_proj(out.transpose(1, 2).flatten(2))
    return projected


def _join(own: torch.Tensor, cross: torch.Tensor, groups: int) -> torch.Tensor:
    """Return (b, query heads, p + m, head_dim) of prompt and passage keys or values."""
    joined = torch.cat([own.expand(len(cross), -1, -1, -1), cross], dim=2)
    return joined.repeat_interleave(groups, dim=1)


def _masks(config: Any, p: int, real: torch.Tensor, kinds: set[str]) -> dict[str, torch.Tensor]:
    """Return what each position may look at, (1 or b, 1, p, p + m) bool, by kind of layer."""
    position = torch.arange(p, device=real.device)
    distance = position[:, None] - position[None, :]
    causal = distance >= 0
    own = {
        "full_attention": causal,
        "sliding_attention": causal & (distance < config.sliding_window),
    }
    rows = real[:1] if bool(real.all()) else real
    cross = rows[:, None, None, :].expand(-1, 1, p, -1)
    return {k: torch.cat([own[k].expand(len(rows), 1, p, p), cross], dim=-1) for k in kinds}
