"""Training starts from word vectors of co-occurrence and from a decoder that matches words.

From random weights a model this small does not learn to compare a query with a passage in an hour.
So the embedding begins as the factors of a co-occurrence matrix, the encoder as (nearly) the
identity, and the decoder's first layer as a soft word matcher: a query token attends to passage
states that have its own direction, or else to itself, and the two leave different marks. All of it
is only a start: every weight is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

RESERVED = 8
"""Hidden dimensions at the end that hold the marks below instead of a word vector."""
PASSAGE, PROMPT, BEGIN, RARITY, FOUND, MISSED, ANSWER = range(-1, -8, -1)
WINDOW_TOKENS = 4
"""Tokens on each side that count as co-occurring."""
GENTLE, LOUD = -0.8, -0.5
"""Weights of a norm behind a block that begins as nearly the identity (gain 0.2), and of the marks
that such a block leaves (gain 0.5)."""


def word_vectors(
    texts: Sequence[Sequence[int]], vocabulary: int, width: int, seed: int
) -> torch.Tensor:
    """Return (vocabulary, width) unit rows, from co-occurrence within WINDOW_TOKENS tokens.

    The rows are the truncated SVD of positive pointwise mutual information. Tokens that never occur
    get random rows.
    """
    gap = [vocabulary] * WINDOW_TOKENS
    flat = np.concatenate([np.asarray([*text, *gap], dtype=np.int64) for text in texts])
    codes, weights = [], []
    for distance in range(1, WINDOW_TOKENS + 1):
        left, right = flat[:-distance], flat[distance:]
        real = (left < vocabulary) & (right < vocabulary)
        code, count = np.unique(left[real] * vocabulary + right[real], return_counts=True)
        codes.append(code)
        weights.append(count / distance)
    code, where = np.unique(np.concatenate(codes), return_inverse=True)
    weight = np.bincount(where, np.concatenate(weights))
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
    """Return (vocabulary,) inverse document frequencies with mean 0 and deviation 1."""
    found = np.bincount(np.concatenate([np.unique(text) for text in texts]), minlength=vocabulary)
    idf = torch.log(torch.tensor((len(texts) + 1) / (found[:vocabulary] + 1)))
    return ((idf - idf.mean()) / idf.std()).float()


@torch.no_grad()
def start_as_matcher(
    model: Any, tokenizer: Any, texts: Sequence[Sequence[int]], seed: int = 0
) -> None:
    """Set the weights of a T5Gemma2ForConditionalGeneration with two decoder layers, in place.

    Args:
        model: Model of any width; its `head_dim` must be wide enough for slow rotary pairs.
        tokenizer: Tokenizer of the model.
        texts: Token ids of the texts whose words it shall know.
        seed: Seed of the word vectors.
    """
    encoder, decoder = model.model.encoder.text_model, model.model.decoder
    d = encoder.config.hidden_size
    vocabulary = encoder.config.vocab_size
    yes, no, begin = tokenizer.convert_tokens_to_ids(["yes", "no", "<bos>"])
    table = torch.zeros(vocabulary, d)
    table[:, :-RESERVED] = word_vectors(texts, vocabulary, d - RESERVED, seed)
    mark = 1 / d**0.5  # 1 after the embedding's scale of sqrt(d)
    table[:, PASSAGE] = table[:, PROMPT] = mark
    table[:, RARITY] = rarity(texts, vocabulary).clamp(-2, 2) * mark
    table[begin, BEGIN] = 4 * mark
    table[[yes, no]] = 0
    table[yes, ANSWER], table[no, ANSWER] = 0.5, -0.5
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
    attention.k_proj.weight.copy_(key)
    attention.q_proj.weight.copy_(query.repeat(attention.q_proj.out_features // len(query), 1))
    attention.q_norm.weight.fill_(1.5)
    _carry(layer, (PASSAGE, PROMPT), {FOUND: (1.0, 0.0), MISSED: (0.0, 1.0)})
    layer.pre_self_attn_layernorm.weight[PASSAGE] = -1.0  # only passages carry it into the keys


def _gather(layer: Any) -> None:
    """Let the last layer average what the end of the prompt, the query, found and missed.

    Near tokens are preferred by rotary pairs of middling speed, rare ones by a slow pair.
    """
    attention = layer.self_attn
    half = attention.head_dim // 2
    near, rare = slice(half // 8, half // 8 + 8), half - 1
    query = attention.q_proj.weight.normal_(std=0.02).unflatten(0, (-1, attention.head_dim))
    key = attention.k_proj.weight.normal_(std=0.02)
    query[:, near, PROMPT] = query[:, rare, PROMPT] = 1.0
    key[near, PROMPT], key[rare, RARITY] = 1.0, 1.0
    attention.q_norm.weight.fill_(-0.4)
    _carry(layer, (FOUND, MISSED), {ANSWER: (1.0, -1.0), MISSED: (0.0, 1.0)})


def _carry(layer: Any, read: tuple[int, int], write: dict[int, tuple[float, float]]) -> None:
    """Let each head read two marks of what it attends to, and write marks made of the two."""
    attention = layer.self_attn
    value = attention.v_proj.weight.normal_(std=0.02)
    out = attention.o_proj.weight.normal_(std=0.02)
    value[:2] = 0
    value[0, read[0]], value[1, read[1]] = 1.0, 1.0
    for mark, factors in write.items():
        for dimension, factor in enumerate(factors):
            if factor:
                out[mark, dimension :: attention.head_dim] = factor
    norm = layer.post_self_attn_layernorm.weight
    norm[list(write)] = LOUD
