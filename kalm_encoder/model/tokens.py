"""Turns rendered passages into token ids, with the checkpoint's tokenizer or a faster one.

A checkpoint's tokenizer is written for the library `tokenizers`, which decides what is right.
`fastokens` gives the same ids in a fifth of the CPU time for tokenizers like Gemma's, but it takes
seconds and some hundred megabytes to load one. It is worth that beside a GPU, which would wait for
its tokens.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kalm_encoder.errors import InputError
from kalm_encoder.prompts import render_passage

logger = logging.getLogger(__name__)

FlatIds = tuple[NDArray[np.int64], NDArray[np.int64]]
"""The token ids of all texts, one behind the other, and the number of tokens of each text."""


def passage_ids(tokenizer: Any, texts: Sequence[str]) -> FlatIds:
    """Render passages and return their token ids, not cut and without special tokens."""
    return _exact(tokenizer.backend_tokenizer, [render_passage(text) for text in texts])


def _exact(backend: Any, texts: list[str]) -> FlatIds:
    # The file may ask for either. Not at every call: it fails while another thread tokenises.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    encoded = [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
    lengths = np.array([len(ids) for ids in encoded], np.int64)
    # One array for all: packing lists of ints into batches would hold Python's lock for long.
    return np.fromiter(chain.from_iterable(encoded), np.int64, lengths.sum()), lengths


def fast_passage_ids(tokenizer: Any) -> Callable[[Sequence[str]], FlatIds] | None:
    """Return a `passage_ids` of this tokenizer by fastokens, or None if it is not to be had.

    It is not if fastokens is not installed, does not know this kind of tokenizer, or gives other
    ids for any of the texts in `_probes`.
    """
    backend, probes = tokenizer.backend_tokenizer, _probes(tokenizer)
    right = _exact(backend, probes)  # before it is copied: it drops what the file says of lengths
    try:
        fast = importlib.import_module("fastokens").Tokenizer.from_json_str(backend.to_str())
    except (ImportError, ValueError) as error:
        logger.info("tokenising without fastokens: %s", error)
        return None

    def encode(texts: list[str]) -> FlatIds:
        ids, ends = fast.encode_batch_flat(texts, add_special_tokens=False)
        bounds = np.frombuffer(ends, np.int64)
        return np.frombuffer(ids, np.uint32).astype(np.int64), bounds[1:] - bounds[:-1]

    pairs = zip(encode(probes), right, strict=True)
    if not all(np.array_equal(ours, theirs) for ours, theirs in pairs):
        logger.warning("fastokens gives other ids than this tokenizer: tokenising without it")
        return None
    return lambda texts: encode([render_passage(text) for text in texts])


def _probes(tokenizer: Any) -> list[str]:
    """Return texts of a tenth of the vocabulary, as it is spelled and as it reads, and scripts."""
    vocabulary = sorted(tokenizer.get_vocab())
    spelled = ["".join(vocabulary[i : i + 64]) for i in range(0, len(vocabulary), 640)]
    read = [text.replace("▁", " ") for text in spelled]
    points = [point for point in range(0x20000) if not 0xD800 <= point < 0xE000]
    scripts = ["".join(map(chr, points[i : i + 512 : 5])) for i in range(0, len(points), 512)]
    return [*spelled, *read, *scripts]


def check_max_length(max_length: int, tokenizer: Any, text_config: Any) -> None:
    """Refuse a passage length that no passage fits in, or that exceeds the model's positions.

    Raises:
        InputError: If the length is outside these limits; the message names both.
    """
    limit = int(text_config.max_position_embeddings)
    shortest = len(tokenizer(render_passage(""), add_special_tokens=False)["input_ids"])
    if not shortest < max_length <= limit:
        raise InputError(
            f"max_length {max_length} must be above {shortest} (the tokens of the passage "
            f"prefix) and at most {limit} (the model's positions)"
        )
