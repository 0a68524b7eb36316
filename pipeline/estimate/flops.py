"""Floating point operations of the encoder and the decoder, from the dimensions of a model alone.

A multiplication and an addition are two operations. The matrix products and the attention are
counted; norms, rotary positions and softmax are left out (they are below 1 % for all three sizes).
Embedding look-ups cost none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a T5Gemma2; encoder and decoder have the same.

    Attributes:
        hidden: Width d of a state.
        intermediate: Width of the gated feed-forward.
        layers: Layers of each half.
        heads, kv_heads, head_dim: Sizes of the attention.
        sliding_window: Tokens that a sliding layer looks at.
        full_layers: Number of layers that look at everything.
        vocabulary: Tokens of the embedding.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    head_dim: int
    sliding_window: int
    vocabulary: int
    full_layers: int
    kv_heads: int = 1

    @classmethod
    def of(cls, config: Any) -> Dimensions:
        """Read the dimensions from a T5Gemma2 text or decoder config."""
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.head_dim,
            config.sliding_window,
            config.vocab_size,
            list(config.layer_types).count("full_attention"),
            config.num_key_value_heads,
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
        """Weights of all layers of one half: the non-embedding parameters without the norms."""
        return self.layers * (self.key_value_params + self.other_params)


MODELS = {
    "Nano": Dimensions(640, 2048, 18, 4, 256, 512, 262144, 3),
    "Small": Dimensions(1152, 6912, 26, 4, 256, 512, 262144, 4),
    "Large": Dimensions(2560, 10240, 34, 8, 256, 1024, 262144, 5, kv_heads=4),
}
"""KaLM-Reranker-V1: 100M, 698M and 3,209M parameters in each half; 168M, 302M and 671M in the
embedding. The windows are those of the Gemma 3 models that each was made from."""


def encoder_flops(dimensions: Dimensions, lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the operations of encoding passages of n tokens each.

    A passage takes 2 n params, plus 4 heads head_dim for each pair of tokens of which one attends
    to the other. There are n² pairs in a full layer. In a sliding layer of window w a token sees
    ceil(w / 2) tokens up to itself and floor(w / 2) tokens after it. (PyTorch also computes the
    hidden pairs of a sliding layer, and masks them.)
    """
    n = lengths.astype(np.float64)
    before = np.minimum(n, (dimensions.sliding_window + 1) // 2)
    after = np.minimum(n - 1, dimensions.sliding_window // 2)
    seen = before * (before + 1) / 2 + (n - before) * before
    seen += after * (after + 1) / 2 + (n - 1 - after) * after
    full = dimensions.full_layers
    pairs = full * n * n + (dimensions.layers - full) * seen
    inner = dimensions.heads * dimensions.head_dim
    flops: NDArray[np.float64] = 2 * n * dimensions.params + 4 * inner * pairs
    return flops


def decoder_flops(dimensions: Dimensions, prompt: int, states: float, candidates: int = 1) -> float:
    """Return the operations of scoring candidates that share one prompt, as decoder_forward does.

    In each layer the passage costs its keys and values, 2 states key_value_params, and each of the
    p prompt tokens costs everything: 2 params, and 4 heads head_dim (states + p) for the attention.
    The first layer projects queries, keys and values of the shared prompt once for all candidates.
    The last layer computes only keys and values before the last position. The LM head computes two
    rows at one position.

    Args:
        dimensions: Dimensions of the decoder.
        prompt: Number of prompt tokens, p.
        states: Mean number of states of a passage.
        candidates: Number of passages in one batch.
    """
    inner = dimensions.heads * dimensions.head_dim
    query = 2 * dimensions.hidden * inner
    # What o_proj and the feed-forward cost per token.
    rest = 2 * (dimensions.other_params - dimensions.hidden * inner)
    own = 2 * dimensions.key_value_params
    total = 0.0
    for layer in range(dimensions.layers):
        rows = 1 if layer == 0 else candidates
        positions = 1 if layer == dimensions.layers - 1 else prompt
        total += rows * (prompt * own + positions * query)
        attention = 4 * inner * positions * (prompt + states)
        total += candidates * (states * own + positions * rest + attention)
    return total + candidates * 2 * 2 * dimensions.hidden
