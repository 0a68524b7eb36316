"""The decoder's forward for prompts and their passages, with every saving that is exact.

Rows usually share one prompt, and only its last position is read. So the first layer projects a
shared prompt once for all rows, the last layer computes queries, output and feed-forward for the
last position alone, and the mask has one row per passage only where lengths differ. What a prompt
attends to beside itself is a *memory*: the passage's keys and values, projected now
(`PassageMemory`), or kept from before together with those of the prompt's beginning (`KeptMemory`).
The layers' own weights are used; what they compute is T5Gemma2's merged attention (self and cross
in one softmax, keys and values of both from the same projections).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from kalm_encoder.model.layers import feed_forward, norm, rotate


@dataclass(frozen=True, slots=True)
class PassageMemory:
    """Passages whose keys and values are projected in each layer.

    Attributes:
        states: (b, m, d), right padded.
        real: (b, m) bool, False for padding; (1, m) where all rows are alike.
    """

    states: torch.Tensor
    real: torch.Tensor
    prefix: int = 0

    def keys_values(self, attention: Any, _layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both as (b, kv heads, m, head_dim)."""
        return _project(attention, self.states)


@dataclass(frozen=True, slots=True)
class KeptMemory:
    """Keys and values kept from an earlier forward, of a prompt's first tokens and the passage.

    Attributes:
        entries: one (layers, 2, prefix + m_i, kv heads, head_dim) tensor a row, see `last_hidden`.
        prefix: how many prompt tokens they hold; the prompts given now begin behind them.
        real: (b, prefix + m) bool, False for padding; (1, prefix + m) where all rows are alike.
    """

    entries: Sequence[torch.Tensor]
    prefix: int
    real: torch.Tensor

    def keys_values(self, _attention: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both as (b, kv heads, prefix + m, head_dim)."""
        keys, values = (
            pad_sequence([entry[layer, part] for entry in self.entries], batch_first=True)
            for part in (0, 1)
        )
        return keys.transpose(1, 2), values.transpose(1, 2)


def last_hidden(
    model: Any,
    prompts: torch.Tensor,
    memory: PassageMemory | KeptMemory,
    *,
    keep: int = 0,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the decoder and return its final hidden state at the last prompt position.

    Args:
        model: a T5Gemma2Decoder in eval mode.
        prompts: (1 or b, p) token ids of one length; one row where all passages share it.
        memory: of the b passages.
        keep: also return keys and values of the first `keep` prompt tokens and the passages.
        positions: (p,) of the tokens given, rising to the last; below 0 they are padding. None:
            they begin at 0, or behind what the memory holds, and none is padding.

    Returns:
        (b, d) after the final norm, and with `keep` a (b, layers, 2, keep + m, kv heads, head_dim)
        tensor, each row of it, its padding cut off, an entry for `KeptMemory`; else None.
    """
    config = model.config
    layers = model.layers[: config.num_hidden_layers]
    hidden = model.embed_tokens(prompts)  # (1 or b, p, d)
    if positions is None:
        positions = torch.arange(prompts.shape[1], device=prompts.device) + memory.prefix
    rotary = {
        kind: [part.unsqueeze(1) for part in model.rotary_emb(hidden, positions[None], kind)]
        for kind in set(config.layer_types)
    }
    masks = _masks(config, positions, memory, hidden.dtype)
    kept = []
    for i, layer in enumerate(layers):
        attention, kind = layer.self_attn, config.layer_types[i]
        normed = norm(layer.pre_self_attn_layernorm, hidden)
        own = _project(attention, normed, rotary[kind])
        other = memory.keys_values(attention, i)
        if keep:
            kept.append(_to_keep(own, other, keep))
        last = -1 if layer is layers[-1] else 0  # from which position on there is more to compute
        turn = [part[:, :, last:] for part in rotary[kind]]
        mask = masks[kind][:, :, :, last:].flatten(2, 3)
        hidden, normed = hidden[:, last:], normed[:, last:]
        attended = _attend(attention, normed, turn, own, other, mask)
        hidden = hidden + norm(layer.post_self_attn_layernorm, attended)
        fed = feed_forward(layer.mlp, norm(layer.pre_feedforward_layernorm, hidden))
        hidden = hidden + norm(layer.post_feedforward_layernorm, fed)
    return norm(model.norm, hidden)[:, -1], torch.stack(kept, dim=1) if keep else None


def _project(
    attention: Any, hidden: torch.Tensor, rotary: Sequence[torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values (b, kv heads, n, head_dim) of (b, n, d); rotated if asked for."""
    heads = (*hidden.shape[:2], -1, attention.head_dim)
    key = norm(attention.k_norm, attention.k_proj(hidden).view(heads)).transpose(1, 2)
    value = attention.v_proj(hidden).view(heads).transpose(1, 2)
    return key if rotary is None else rotate(key, *rotary), value


def _attend(
    attention: Any,
    hidden: torch.Tensor,
    rotary: Sequence[torch.Tensor],
    own: tuple[torch.Tensor, torch.Tensor],
    other: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
) -> torch.Tensor:
    """Return (b, p, d): attention over memory and prompt, in one softmax.

    The query heads of one key head are laid out one after the other as if they were positions, so
    that keys and values are never repeated.

    Args:
        attention: the layer's T5Gemma2MergedAttention.
        hidden: (1 or b, p, d), normed.
        rotary: cos and sin, (1, 1, p, head_dim).
        own: keys and values of the prompts, (1 or b, kv heads, p', head_dim).
        other: those of the memory, (b, kv heads, n, head_dim).
        mask: additive, (1 or b, 1, heads / kv heads * p, n + p').
    """
    b, p = len(other[0]), hidden.shape[1]
    heads = (*hidden.shape[:2], -1, attention.head_dim)
    query = norm(attention.q_norm, attention.q_proj(hidden).view(heads)).transpose(1, 2)
    query = rotate(query, *rotary)  # (1 or b, heads, p, head_dim)
    shape = (query.shape[0], own[0].shape[1], -1, attention.head_dim)
    key, value = (
        torch.cat([memory, prompt.expand(b, -1, -1, -1)], dim=2)
        for memory, prompt in zip(other, own, strict=True)
    )
    out = scaled_dot_product_attention(
        query.reshape(shape).expand(b, -1, -1, -1),
        key,
        value,
        attn_mask=mask,
        scale=attention.scaling,
    )
    out = out.reshape(b, -1, p, attention.head_dim).transpose(1, 2).flatten(2)
    projected: torch.Tensor = attention.o_proj(out)
    return projected


def _to_keep(
    own: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor], keep: int
) -> torch.Tensor:
    """Return (b, 2, keep + m, kv heads, head_dim): what the same passage will need again."""
    b = len(other[0])
    parts = [
        torch.cat([prompt[:, :, :keep].expand(b, -1, -1, -1), passage], dim=2)
        for prompt, passage in zip(own, other, strict=True)
    ]
    return torch.stack(parts, dim=1).transpose(2, 3)


def _masks(
    config: Any, positions: torch.Tensor, memory: PassageMemory | KeptMemory, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return additive masks (1 or b, 1, heads / kv heads, p, n + p), by kind of layer."""
    p, groups = len(positions), config.num_attention_heads // config.num_key_value_heads
    real = memory.real[:, None, None, :].expand(-1, 1, p, -1)
    before = torch.arange(memory.prefix, device=positions.device)
    columns = torch.cat([before, positions])
    distance = positions[:, None] - columns[None, :]  # (p, prefix + p)
    masks = {}
    for kind in set(config.layer_types):
        seen = (distance >= 0) & (columns >= 0)
        if kind == "sliding_attention":
            seen = seen & (distance < config.sliding_window)
        shown = seen.expand(len(real), 1, -1, -1)
        begun, own = shown[..., : memory.prefix], shown[..., memory.prefix :]
        passage = real[..., memory.prefix :]
        allowed = torch.cat([begun, passage, own], dim=-1)
        mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        mask = mask.masked_fill_(~allowed, -torch.inf)
        masks[kind] = mask.unsqueeze(2).repeat(1, 1, groups, 1, 1)
    return masks
