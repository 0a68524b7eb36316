"""The decoder's forward for prompts and their passages, with every saving that is exact.

The rows of a batch usually share one prompt, and only its last position is read. Therefore the
first layer projects a shared prompt once for all rows, the last layer computes queries, output and
feed-forward for the last position alone, and the mask has one row per passage only if their lengths
differ. What a prompt attends to besides itself is called its memory: the keys and values of the
passage, which are either projected now (`PassageMemory`) or kept from an earlier forward together
with those of the prompt's beginning (`KeptMemory`).

The forward uses the weights of the model's own layers. It computes T5Gemma2's merged attention:
self and cross attention in one softmax, with keys and values of both from the same projections.
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
        states: States of the passages, (b, m, d), padded on the right.
        real: (b, m) bool, False for padding; (1, m) if all rows have the same length.
        prefix: Number of prompt tokens that the memory holds, which is none.
    """

    states: torch.Tensor
    real: torch.Tensor
    prefix: int = 0

    def keys_values(self, attention: Any, _layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values, (b, kv heads, m, head_dim) each."""
        return _project(attention, self.states)


@dataclass(frozen=True, slots=True)
class KeptMemory:
    """Keys and values of a prompt's first tokens and of the passage, kept from an earlier forward.

    Attributes:
        entries: A (layers, 2, prefix + m_i, kv heads, head_dim) tensor per row; see `last_hidden`.
        prefix: Number of prompt tokens that they hold. The prompts given now begin after these.
        real: (b, prefix + m) bool, False for padding; (1, prefix + m) if all rows have the same
            length.
    """

    entries: Sequence[torch.Tensor]
    prefix: int
    real: torch.Tensor

    def keys_values(self, _attention: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values, (b, kv heads, prefix + m, head_dim) each."""
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
        model: A T5Gemma2Decoder in eval mode.
        prompts: Token ids of prompts of one length, (1 or b, p); one row if all passages share it.
        memory: Memory of the b passages.
        keep: Number of prompt tokens whose keys and values are returned with those of the passages.
        positions: Positions of the given tokens, (p,), ascending. Tokens at negative positions are
            padding. None means that they begin at 0, or after what the memory holds.

    Returns:
        The hidden state after the final norm, (b, d), and with `keep` a tensor of shape (b, layers,
        2, keep + m, kv heads, head_dim), otherwise None. A row of that tensor without its padding
        is an entry for `KeptMemory`.
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
        first = -1 if layer is layers[-1] else 0  # the last layer computes the last position alone
        rotation = [part[:, :, first:] for part in rotary[kind]]
        mask = masks[kind][:, :, :, first:].flatten(2, 3)
        hidden, normed = hidden[:, first:], normed[:, first:]
        attended = _attend(attention, normed, rotation, own, other, mask)
        hidden = hidden + norm(layer.post_self_attn_layernorm, attended)
        fed = feed_forward(layer.mlp, norm(layer.pre_feedforward_layernorm, hidden))
        hidden = hidden + norm(layer.post_feedforward_layernorm, fed)
    return norm(model.norm, hidden)[:, -1], torch.stack(kept, dim=1) if keep else None


def _project(
    attention: Any, hidden: torch.Tensor, rotary: Sequence[torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys, rotated if `rotary` is given, and the values: (b, kv heads, n, head_dim)."""
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
    """Return (b, p, d): attention over memory and prompt in one softmax.

    The query heads of one key head are laid out as if they were positions, so that keys and values
    are never repeated.

    Args:
        attention: T5Gemma2MergedAttention of the layer.
        hidden: Normed hidden states, (1 or b, p, d).
        rotary: Cosines and sines, (1, 1, p, head_dim).
        own: Keys and values of the prompts, (1 or b, kv heads, p', head_dim).
        other: Keys and values of the memory, (b, kv heads, n, head_dim).
        mask: Additive mask, (1 or b, 1, heads / kv heads * p, n + p').
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
    """Return what a later forward of the same passages needs: (b, 2, keep + m, kv heads, k)."""
    b = len(other[0])
    parts = [
        torch.cat([prompt[:, :, :keep].expand(b, -1, -1, -1), passage], dim=2)
        for prompt, passage in zip(own, other, strict=True)
    ]
    return torch.stack(parts, dim=1).transpose(2, 3)


def _masks(
    config: Any, positions: torch.Tensor, memory: PassageMemory | KeptMemory, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return an additive mask (1 or b, 1, heads / kv heads, p, n + p) per kind of layer."""
    p, groups = len(positions), config.num_attention_heads // config.num_key_value_heads
    passage = memory.real[:, None, None, memory.prefix :].expand(-1, 1, p, -1)
    before = torch.arange(memory.prefix, device=positions.device)
    columns = torch.cat([before, positions])
    distance = positions[:, None] - columns[None, :]  # (p, prefix + p)
    masks = {}
    for kind in set(config.layer_types):
        seen = (distance >= 0) & (columns >= 0)
        if kind == "sliding_attention":
            seen = seen & (distance < config.sliding_window)
        shown = seen.expand(len(passage), 1, -1, -1)
        begun, own = shown[..., : memory.prefix], shown[..., memory.prefix :]
        allowed = torch.cat([begun, passage, own], dim=-1)
        mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        mask = mask.masked_fill_(~allowed, -torch.inf)
        masks[kind] = mask.unsqueeze(2).repeat(1, 1, groups, 1, 1)
    return masks
