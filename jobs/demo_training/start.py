"""Where training starts: word vectors from co-occurrence, and a decoder that matches words.

From random weights a model this small does not learn to compare a query with a passage in an hour.
So the embedding begins as the factors of a co-occurrence matrix, the encoder as (nearly) the
identity, and the decoder's first layer as a soft word matcher: a query token attends to passage
states with its own direction, or else to itself, and the two leave different marks. All of it is a
start: every weight is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

RESERVED = 8
"""Hidden dimensions that hold no word vector but the marks below, counted from the end."""
PASSAGE, PROMPT, BEGIN, RARITY, FOUND, MISSED, ANSWER = range(-1, -8, -1)
WINDOW = 4
"""Tokens on each side that count as co-occurring."""
GENTLE = -0.8
"""Weight of a norm behind a block that shall begin as nearly the identity (gain 0.2)."""


def word_vectors(
    texts: Sequence[Sequence[int]], vocabulary: int, width: int, seed: int = 0
) -> torch.Tensor:
    """Return (vocabulary, width) unit rows, from co-occurrence within WINDOW tokens.

    They are the truncated SVD of positive pointwise mutual information; tokens that never occur get
    random rows.
    """
    gap = [vocabulary] * WINDOW
    flat = np.concatenate([np.asarray([*text, *gap], dtype=np.int64) for text in texts])
    pairs, counts = [], []
    for distance in range(1, WINDOW + 1):
        left, right = flat[:-distance], flat[distance:]
        real = (left < vocabulary) & (right < vocabulary)
        code, count = np.unique(left[real] * vocabulary + right[real], return_counts=True)
        pairs.append(code)
        counts.append(count / distance)
    code, where = np.unique(np.concatenate(pairs), return_inverse=True)
    weight = np.bincount(where, np.concatenate(counts))
    rows, columns = np.divmod(code, vocabulary)
    rows, columns = np.concatenate([rows, columns]), np.concatenate([columns, rows])
    weight = np.concatenate([weight, weight])
    total = np.bincount(rows, weight, minlength=vocabulary)
    smooth = total**0.75  # so that rare contexts are not all that counts
    expected = total[rows] * smooth[columns] / smooth.sum()
    pmi = np.log(weight / expected).clip(min=0)
    matrix = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([rows, columns])),
        torch.from_numpy(pmi.astype(np.float32)),
        (vocabulary, vocabulary),
        check_invariants=True,
    ).coalesce()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, _ = torch.svd_lowrank(matrix, q=width + 8, niter=4)
        noise = torch.randn(vocabulary, width) / width**0.5
    vectors = u[:, :width] * s[:width].sqrt()
    seen = torch.from_numpy(total > 0)
    vectors = vectors - vectors[seen].mean(dim=0)
    vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-9)
    return torch.where(seen.unsqueeze(1), vectors, noise)


def rarity(texts: Sequence[Sequence[int]], vocabulary: int) -> torch.Tensor:
    """Return (vocabulary,) inverse document frequencies, mean 0 and deviation 1."""
    found = np.bincount(np.concatenate([np.unique(text) for text in texts]), minlength=vocabulary)[
        :vocabulary
    ]
    idf = torch.log(torch.tensor((len(texts) + 1) / (found + 1)))
    return ((idf - idf.mean()) / idf.std()).float()


@torch.no_grad()
def start_as_matcher(
    model: Any, vectors: torch.Tensor, idf: torch.Tensor, tokens: dict[str, int]
) -> None:
    """Set the weights of a T5Gemma2ForConditionalGeneration of two decoder layers, in place.

    Args:
        model: of any width; `head_dim` wide enough for slow rotary pairs.
        vectors: (vocabulary, d - RESERVED), see `word_vectors`.
        idf: (vocabulary,), see `rarity`.
        tokens: ids of `yes`, `no` and `<bos>`.
    """
    encoder, decoder = model.model.encoder.text_model, model.model.decoder
    d = encoder.config.hidden_size
    table = torch.zeros(len(vectors), d)
    table[:, :-RESERVED] = vectors
    mark = 1 / d**0.5  # 1 after the embedding's scale of sqrt(d)
    table[:, PASSAGE] = table[:, PROMPT] = mark
    table[:, RARITY] = idf.clamp(-2, 2) * mark
    table[tokens["<bos>"], BEGIN] = 4 * mark
    for answer, sign in (("yes", 1.0), ("no", -1.0)):
        table[tokens[answer]] = 0
        table[tokens[answer], ANSWER] = sign * 0.5
    encoder.embed_tokens.weight.copy_(table)
    encoder.norm.weight[PROMPT] = -1.0  # passages lose this mark, prompts keep it
    for layer in [*encoder.layers, *decoder.layers]:
        layer.post_self_attn_layernorm.weight.fill_(GENTLE)
        layer.post_feedforward_layernorm.weight.fill_(GENTLE)
    _match(decoder.layers[0])
    _gather(decoder.layers[-1])
    decoder.norm.weight.fill_(0.0)


def _match(layer: Any) -> None:
    """Let the first layer compare words: keys and queries hold the word in slow rotary pairs."""
    attention = layer.self_attn
    half = attention.head_dim // 2
    slow = [*range(half * 3 // 8, half), *range(half + half * 3 // 8, 2 * half)]
    mark, slow = slow[-1], slow[:-1]
    d = attention.q_proj.in_features
    words = torch.linalg.qr(torch.randn(d - RESERVED, len(slow)))[0].T  # orthonormal rows
    key = torch.zeros(attention.head_dim, d)
    key[slow, : d - RESERVED] = words
    query = key.clone()
    query[mark, PROMPT] = 4.5
    key[mark, PASSAGE], key[mark, PROMPT], key[mark, BEGIN] = 4.5, -2.0, 2.0
    heads = attention.q_proj.out_features // attention.head_dim
    attention.k_proj.weight.copy_(key)
    attention.q_proj.weight.copy_(query.repeat(heads, 1))
    attention.q_norm.weight.fill_(1.5)
    value = attention.v_proj.weight
    value.normal_(std=0.02)
    value[:2] = 0
    value[0, PASSAGE], value[1, PROMPT] = 1.0, 1.0
    out = attention.o_proj.weight.normal_(std=0.02)
    for head in range(heads):
        out[FOUND, head * attention.head_dim] = 1.0
        out[MISSED, head * attention.head_dim + 1] = 1.0
    layer.pre_self_attn_layernorm.weight[PASSAGE] = -1.0  # only passages carry it into the keys
    layer.post_self_attn_layernorm.weight.fill_(GENTLE)
    layer.post_self_attn_layernorm.weight[[FOUND, MISSED]] = -0.5


def _gather(layer: Any) -> None:
    """Let the last layer average what was found and missed over the end of the prompt: the query.

    Near tokens are preferred by rotary pairs of middling speed, rare ones by a slow pair.
    """
    attention = layer.self_attn
    half = attention.head_dim // 2
    near, rare = slice(half // 8, half // 8 + 8), half - 1
    query, key = attention.q_proj.weight, attention.k_proj.weight
    query.normal_(std=0.02)
    key.normal_(std=0.02)
    heads = attention.q_proj.out_features // attention.head_dim
    query.view(heads, attention.head_dim, -1)[:, near, PROMPT] = 1.0
    query.view(heads, attention.head_dim, -1)[:, rare, PROMPT] = 1.0
    key[near, PROMPT], key[rare, RARITY] = 1.0, 1.0
    attention.q_norm.weight.fill_(-0.4)
    value, out = attention.v_proj.weight.normal_(std=0.02), attention.o_proj.weight
    out.normal_(std=0.02)
    value[:2] = 0
    value[0, FOUND], value[1, MISSED] = 1.0, 1.0
    for head in range(heads):
        out[ANSWER, head * attention.head_dim] = 1.0
        out[ANSWER, head * attention.head_dim + 1] = -1.0
        out[MISSED, head * attention.head_dim + 1] = 1.0
    layer.post_self_attn_layernorm.weight.fill_(GENTLE)
    layer.post_self_attn_layernorm.weight[[ANSWER, MISSED]] = -0.5
