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

from kalm_encoder.model.layers import Parts, embed, norm, parts, queries, rotary_parts, rotate

KeysValues = tuple[torch.Tensor, torch.Tensor]
Rotary = dict[str, list[torch.Tensor]]
"""Cosines and sines by kind of layer."""


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

    @property
    def rows(self) -> int:
        """Number of passages, b."""
        return len(self.states)

    def keys_values(self, compute: Parts, attention: Any, _layer: int) -> KeysValues:
        """Return keys and values, (b, kv heads, m, head_dim) each."""
        found = compute.keys_values(attention, self.states.flatten(0, 1))
        key, value = (_by_head(part, self.rows) for part in found)
        return key, value


@dataclass(frozen=True, slots=True)
class KeptMemory:
    """Keys and values of a prompt's first tokens and of the passage, kept from an earlier forward.

    Attributes:
        entries: (b, prefix + m, layers, 2, kv heads, head_dim), padded on the right; see
            `last_hidden`.
        prefix: Number of prompt tokens that they hold. The prompts given now begin after these.
        real: (b, prefix + m) bool, False for padding; (1, prefix + m) if all rows have the same
            length.
    """

    entries: torch.Tensor
    prefix: int
    real: torch.Tensor

    @property
    def rows(self) -> int:
        """Number of passages, b."""
        return len(self.entries)

    def keys_values(self, _compute: Parts, _attention: Any, layer: int) -> KeysValues:
        """Return keys and values, (b, kv heads, prefix + m, head_dim) each."""
        key, value = self.entries[:, :, layer].unbind(2)
        return key.transpose(1, 2), value.transpose(1, 2)


def last_hidden(
    model: Any,
    prompts: torch.Tensor,
    memory: PassageMemory | KeptMemory,
    *,
    keep: int = 0,
    positions: torch.Tensor | None = None,
    fuse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the decoder and return its final hidden state at the last prompt position.

    Args:
        model: A T5Gemma2Decoder in eval mode.
        prompts: Token ids of prompts of one length, (1 or b, p); one row if all passages share it.
        memory: Memory of the b passages.
        keep: Number of prompt tokens whose keys and values are returned with those of the passages.
        positions: Positions of the given tokens, (p,), ascending. Tokens at negative positions are
            padding. None means that they begin at 0, or after what the memory holds.
        fuse: Whether the parts between the attentions go through torch.compile.

    Returns:
        The hidden state after the final norm, (b, d), and with `keep` a tensor of shape (b,
        keep + m, layers, 2, kv heads, head_dim), otherwise None. A row of that tensor without its
        padding is what `KeptMemory` holds of a passage.
    """
    config, compute = model.config, parts(fuse=fuse)
    rows, p = prompts.shape
    layers = model.layers[: config.num_hidden_layers]
    hidden = embed(model.embed_tokens, prompts.flatten())  # (rows * p, d)
    if positions is None:
        positions = torch.arange(p, device=prompts.device) + memory.prefix
    once = rotary_parts(model, hidden, positions)
    rotary = _repeated(once, rows)
    masks = _masks(config, positions, memory, hidden.dtype)
    kept = []
    for i, layer in enumerate(layers):
        attention, kind = layer.self_attn, config.layer_types[i]
        if layer is layers[-1]:
            found, every = _before_last(compute, layer, hidden, rotary[kind], p), p
        else:
            found, every = compute.before(layer, hidden, *rotary[kind]), 1
        query, key, value = (_by_head(part, rows) for part in found)
        other = memory.keys_values(compute, attention, i)
        if keep:
            kept.append(_to_keep((key, value), other, keep))
        mask = masks[kind][:, :, :, every - 1 :: every].flatten(2, 3)
        seen = _attend(query, (key, value), other, mask, attention.scaling)
        asked = hidden[every - 1 :: every].reshape(rows, p // every, -1)
        asked = asked.expand(memory.rows, -1, -1).flatten(0, 1)
        hidden = compute.after(layer, asked, seen)
        if rows != memory.rows:  # the first layer computed a shared prompt once for all
            rows = memory.rows
            rotary = _repeated(once, rows)
    return norm(model.norm, hidden), torch.stack(kept, dim=2) if keep else None


def _repeated(rotary: Rotary, rows: int) -> Rotary:
    """Return cosines and sines, (p, 1, head_dim), for each of `rows` prompts."""
    return {kind: [part.repeat(rows, 1, 1) for part in pair] for kind, pair in rotary.items()}


def _before_last(
    compute: Parts, layer: Any, hidden: torch.Tensor, rotation: Sequence[torch.Tensor], p: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do as `before_attention` for all but the queries: only those of each p-th row are made."""
    normed = norm(layer.pre_self_attn_layernorm, hidden)
    key, value = compute.keys_values(layer.self_attn, normed)
    query = queries(layer.self_attn, normed[p - 1 :: p])
    query = rotate(query, *(part[p - 1 :: p] for part in rotation))
    return query, rotate(key, *rotation), value


def _by_head(flat: torch.Tensor, rows: int) -> torch.Tensor:
    """Return (rows * n, heads, head_dim) as (rows, heads, n, head_dim)."""
    return flat.view(rows, -1, *flat.shape[1:]).transpose(1, 2)


def _attend(
    query: torch.Tensor,
    own: KeysValues,
    other: KeysValues,
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Return (b * p, heads * head_dim): attention over memory and prompt in one softmax.

    The query heads of one key head are laid out as if they were positions, so that keys and values
    are never repeated.

    Args:
        query: Rotated queries, (1 or b, heads, p, head_dim).
        own: Keys and values of the prompts, (1 or b, kv heads, p', head_dim).
        other: Keys and values of the memory, (b, kv heads, n, head_dim).
        mask: Additive mask, (1 or b, 1, heads / kv heads * p, n + p').
        scale: Factor of the products.
    """
    b, p = len(other[0]), query.shape[2]
    key, value = (
        torch.cat([memory, prompt.expand(b, -1, -1, -1)], dim=2)
        for memory, prompt in zip(other, own, strict=True)
    )
    grouped = query.reshape(len(query), key.shape[1], -1, query.shape[3])
    out = scaled_dot_product_attention(
        grouped.expand(b, -1, -1, -1), key, value, attn_mask=mask, scale=scale
    )
    return out.reshape(b, -1, p, out.shape[3]).transpose(1, 2).flatten(2).flatten(0, 1)


def _to_keep(own: KeysValues, other: KeysValues, keep: int) -> torch.Tensor:
    """Return what a later forward of the same passages needs: (b, keep + m, 2, kv heads, k)."""
    b = len(other[0])
    found = [
        torch.cat([prompt[:, :, :keep].expand(b, -1, -1, -1), passage], dim=2)
        for prompt, passage in zip(own, other, strict=True)
    ]
    return torch.stack(found, dim=1).permute(0, 3, 1, 2, 4)


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
