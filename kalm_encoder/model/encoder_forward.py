"""The text encoder's forward over packed passages, without padding.

The tokens of a batch lie one behind the other, (T, d), so that what works token by token does no
needless work, and attention runs passage by passage (encoder_attention.py). The result equals that
of the model's own padded forward up to float32 rounding
(tests/encoder/model/test_encoder_forward.py).
"""

from __future__ import annotations

from typing import Any

import torch

from kalm_encoder.errors import CheckpointError
from kalm_encoder.model.batching import Packed
from kalm_encoder.model.encoder_attention import choose_attention
from kalm_encoder.model.layers import embed, norm, parts, rotary_parts
from kalm_encoder.model.onednn import pack_linears


class PackedForward:
    """The forward of one text encoder.

    Args:
        model: A T5Gemma2TextEncoder in eval mode. On a CPU the weights of its layers are packed for
            oneDNN: its own forward still works, but its state_dict no longer holds them.
        fuse: Whether the parts between the attentions go through torch.compile; they are compiled
            in the first forward. None fuses on a GPU.

    Raises:
        CheckpointError: If the model caps attention logits.
    """

    def __init__(self, model: Any, *, fuse: bool | None = None) -> None:
        if model.config.attn_logit_softcapping is not None:
            raise CheckpointError(
                f"attn_logit_softcapping {model.config.attn_logit_softcapping}: the encoder of a "
                "KaLM reranker caps no logits, and capping is not built"
            )
        self.model = model
        weight = model.embed_tokens.weight
        fuse = weight.device.type == "cuda" if fuse is None else fuse
        self._parts = parts(fuse=fuse)
        if not fuse:
            pack_linears(model.layers)
        self._attend = choose_attention(weight, model.config.head_dim)

    def __call__(self, ids: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Return the (T, d) last hidden states, after the final norm.

        Args:
            ids: Token ids of all passages one behind the other, (T,) int64 on the device.
            packed: Where each passage lies.
        """
        model, config = self.model, self.model.config
        hidden = embed(model.embed_tokens, ids)
        rotary = rotary_parts(model, hidden, packed.positions)
        for kind, layer in zip(config.layer_types, model.layers, strict=False):
            query, key, value = self._parts.before(layer, hidden, *rotary[kind])
            window = config.sliding_window if kind == "sliding_attention" else None
            scale = layer.self_attn.scaling
            seen = self._attend(query, key, value, packed, scale, window)
            hidden = self._parts.after(layer, hidden, seen.flatten(1))
        return norm(model.norm, hidden)
