"""The loss of the paper: yes/no cross-entropy and listwise ranking, summed over ratios.

The forward is the production one (`last_hidden` over `mean_pool`ed states), so what is trained is
what is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, pad

from kalm_encoder.matryoshka import num_groups
from kalm_encoder.model.decoder_forward import PassageMemory, last_hidden
from kalm_encoder.model.pooling import mean_pool

LISTWISE, BINARY = 1.0, 0.5
"""Weights of the two parts."""


def pooled(
    encoder: Any, batch: Sequence[Sequence[int]], pad_id: int, ratios: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode passages once and pool them at several ratios, the finest first.

    Returns:
        The (ratios, b, m, d) states, padded to the length at the finest ratio, and their
        (ratios, b, m) bool mask.
    """
    lengths = torch.tensor([len(ids) for ids in batch])
    longest = int(lengths.max())
    ids = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in batch])
    mask = torch.arange(longest) < lengths.unsqueeze(1)
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    finest = num_groups(longest, ratios[0])
    states = [mean_pool(hidden, mask, ratio) for ratio in ratios]
    groups = torch.tensor([[num_groups(len(row), ratio) for row in batch] for ratio in ratios])
    padded = torch.stack([pad(s, (0, 0, 0, finest - s.shape[1])) for s in states])
    return padded, torch.arange(finest) < groups.unsqueeze(2)


def margins(
    decoder: Any,
    answers: torch.Tensor,
    prompt: Sequence[int],
    states: torch.Tensor,
    real: torch.Tensor,
) -> torch.Tensor:
    """Return (b,) logits of yes minus no of one prompt against b passages.

    Args:
        decoder: A T5Gemma2Decoder.
        answers: (2, d) LM head rows of yes and no.
        prompt: Token ids.
        states: (b, m, d) pooled states.
        real: (b, m) bool, False for padding.
    """
    hidden, _ = last_hidden(decoder, torch.tensor([list(prompt)]), PassageMemory(states, real))
    logits = hidden.float() @ answers.float().T
    return logits[:, 0] - logits[:, 1]


def loss(margin: torch.Tensor) -> torch.Tensor:
    """Return the loss of one group whose first passage is the relevant one.

    Args:
        margin: (b,) logits, see `margins`.

    Example: margins 0, 0 give cross-entropies log 2 each: 1.0 * 0.693 + 0.5 * 0.693.
    """
    listwise = cross_entropy(margin.unsqueeze(0), torch.zeros(1, dtype=torch.long))
    label = torch.zeros_like(margin)
    label[0] = 1
    # The one relevant passage weighs as much as all others together.
    weight = torch.full_like(margin, 0.5 / max(len(margin) - 1, 1))
    weight[0] = 0.5
    binary = binary_cross_entropy_with_logits(margin, label, weight, reduction="sum")
    return LISTWISE * listwise + BINARY * binary
