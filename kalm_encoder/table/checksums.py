"""Hashes that tell whether a passage or a stored row changed. Lance itself checks no data page."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from kalm_encoder.prompts import render_passage


def text_hash(text: str) -> bytes:
    """Return the xxh3_128 of the rendered text, which tells whether a passage changed."""
    return xxhash.xxh3_128_digest(render_passage(text).encode())


def states_checksum(id: str, num_tokens: int, truncated: bool, states: NDArray[Any]) -> int:
    """Return xxh3_64 over (length of id, id, num_tokens, truncated, states), little endian."""
    digest = xxhash.xxh3_64(framed(id) + struct.pack("<i?", num_tokens, truncated))
    digest.update(np.ascontiguousarray(states).data)
    return digest.intdigest()


def row_checksum(id: str, text_hash: bytes, shard_id: str) -> int:
    """Return xxh3_64 over (length of id, id, text_hash, shard_id)."""
    return xxhash.xxh3_64_intdigest(framed(id) + text_hash + shard_id.encode())


def framed(text: str) -> bytes:
    """Return a text with its length in front, so that what follows cannot be taken for a part."""
    raw = text.encode()
    return struct.pack("<I", len(raw)) + raw
