"""Floating point operations of the encoder and the decoder, from their dimensions alone.

A multiply and an add are two. Counted are the matrix products and the attention; norms, rotary
positions and softmax are left out (below 1 % for all three sizes). Embedding look-ups cost none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Shape:
    """Dimensions of one half of a T5Gemma2; encoder and decoder have the same.

    Attributes:
        hidden: width d of a state.
        intermediate: of the gated feed-forward.
        layers: of the half.
        heads, kv_heads, head_dim: of the attention.
        sliding_window: tokens a sliding layer looks at.
        full_layers: how many layers look at everything.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    sliding_window: int
    full_layers: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read the dimensions of a T5Gemma2 text or decoder config."""
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.sliding_window,
            list(config.layer_types).count("full_attention"),
        )

    @property
    def key_value_params(self) -> int:
        """Weights of k_proj and v_proj in one layer."""
        return 2 * self.hidden * self.kv_heads * self.head_dim

    @property
    def other_params(self) -> int:
        """Weights of q_proj, o_proj and the feed-forward in one layer."""
        return 2 * self.hidden * self.heads * self.head_dim + 3 * self.hidden * self.intermediate

    @property
    def params(self) -> int:
        """Weights of all layers: the non-embedding parameters but for the norms."""
        return self.layers * (self.key_value_params + self.other_params)


NANO = Shape(640, 2048, 18, 4, 1, 256, 512, 3)
SMALL = Shape(1152, 6912, 26, 4, 1, 256, 512, 4)
LARGE = Shape(2560, 10240, 34, 8, 4, 256, 1024, 5)
MODELS = {"Nano": NANO, "Small": SMALL, "Large": LARGE}
"""KaLM-Reranker-V1; the windows are those of the Gemma 3 models each was made from."""


def encoder_flops(shape: Shape, lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the operations of encoding passages of n tokens each.

    2 n params, plus 4 heads head_dim for each pair of tokens of which one attends to the other: n²
    in a full layer; in a sliding layer of window w a token sees ceil(w / 2) tokens up to itself and
    floor(w / 2) after it. (PyTorch computes the hidden pairs of a sliding layer too, and masks
    them.)
    """
    n = lengths.astype(np.float64)
    before = np.minimum(n, (shape.sliding_window + 1) // 2)
    after = np.minimum(n - 1, shape.sliding_window // 2)
    seen = before * (before + 1) / 2 + (n - before) * before
    seen += after * (after + 1) / 2 + (n - 1 - after) * after
    pairs = shape.full_layers * n * n + (shape.layers - shape.full_layers) * seen
    flops: NDArray[np.float64] = 2 * n * shape.params + 4 * shape.heads * shape.head_dim * pairs
    return flops


def decoder_flops(shape: Shape, prompt: int, states: float, candidates: int = 1) -> float:
    """Return the operations of scoring candidates that share one prompt, as decoder_forward does.

    In each layer the passage costs its keys and values, 2 states key_value_params, and each of the
    p prompt tokens everything: 2 params and 4 heads head_dim (states + p) of attention. The first
    layer projects queries, keys and values of the shared prompt once for all; the last computes
    only keys and values before the last position. Of the LM head two rows at one position count.

    Args:
        shape: of the decoder.
        prompt: p tokens.
        states: of a passage, on average.
        candidates: in one batch.
    """
    inner = shape.heads * shape.head_dim
    query = 2 * shape.hidden * inner
    rest = 2 * (shape.other_params - shape.hidden * inner)  # o_proj and feed-forward, a token
    own = 2 * shape.key_value_params
    total = 0.0
    for layer in range(shape.layers):
        rows = 1 if layer == 0 else candidates
        positions = 1 if layer == shape.layers - 1 else prompt
        total += rows * (prompt * own + positions * query)
        attention = 4 * inner * positions * (prompt + states)
        total += candidates * (states * own + positions * rest + attention)
    return total + candidates * 2 * 2 * shape.hidden
