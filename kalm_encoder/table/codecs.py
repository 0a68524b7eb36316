"""Stores the states of passages as float32, float16, int8 or int4.

A few dimensions of a state are many times larger than the others, and most of what a state holds is
common to all states of its passage. Rounding to a few bits must not lose the rest. Therefore the
integer codecs spread every 64 dimensions over each other before they round, which is a rotation and
takes no bytes; and int4 stores the mean of a passage once and each state as its difference from it.
Neither has to know anything of the model or the corpus.

    rotation  d is padded with zeros to P, a multiple of 64. Each block of 64 values is multiplied
              by the Hadamard matrix of order 64 divided by 8, which is its own inverse. The matrix
              has +1 in row i, column j if i AND j has an even number of one bits, and -1 otherwise.
    scales    128 rotated values share one scale, and the last 64 have their own if P is no multiple
              of 128. A scale is the value of largest magnitude divided by -128 (int8) or -8 (int4),
              in float16. Values are divided by it, rounded to nearest and clipped to -128 to 127 or
              -8 to 7. A scale of zero stands for zeros.
    int8      P signed bytes, then the scales, little endian
    int4      P / 2 bytes, with the even value in the low four bits and 8 added to each value; then
              the scales, little endian

An int4 passage has one vector more than it has states. The first one is the mean of the states, and
each other one is the difference of a state from that mean as it was stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kalm_encoder.table.codecs_v1 import INT4_GROUP, IntCodec

BLOCK = 64
"""Number of dimensions that are rotated together."""
GROUP = 128
"""Number of rotated values that share a scale. 64 is 10 % more exact and takes 3 % more bytes."""


@dataclass(frozen=True)
class FloatCodec:
    """Stores states as they are, in float16 or float32.

    Attributes:
        dtype: Type of the stored items.
        extra: Number of vectors that a passage has beside its states.
    """

    dtype: type[np.floating[Any]]
    extra: int = 0

    @property
    def limit(self) -> float:
        """The largest magnitude that can be stored."""
        return float(np.finfo(self.dtype).max)

    def width(self, dim: int) -> int:
        """Return the number of stored items per vector."""
        return dim

    def encode(self, states: NDArray[np.float32], counts: NDArray[np.int64]) -> NDArray[Any]:
        """Return (n, width) of this codec's dtype."""
        return states.astype(self.dtype)

    def decode(
        self, stored: NDArray[Any], counts: NDArray[np.int64], dim: int
    ) -> NDArray[np.floating[Any]]:
        """Return (n, d) in the stored dtype."""
        return stored


@dataclass(frozen=True)
class RotatedCodec:
    """Stores rotated states as scaled integers of 8 or 4 bits.

    Attributes:
        bits: 8 or 4.
        extra: 1 if the mean of a passage comes before its states, which are then differences from
            it; otherwise 0.
        dtype: Type of the stored items.
    """

    bits: int
    extra: int
    dtype: type[np.uint8] = np.uint8

    @property
    def limit(self) -> float:
        """The largest magnitude with which no scale overflows float16."""
        return float(np.finfo(np.float16).max) / 4

    def width(self, dim: int) -> int:
        """Return the number of bytes per vector, values and scales together."""
        padded = _padded(dim)
        return padded * self.bits // 8 + 2 * -(-padded // GROUP)

    def encode(self, states: NDArray[np.float32], counts: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Encode the states of b passages, one behind the other.

        Args:
            states: (n, d).
            counts: Number of states of each passage, (b,), each at least 1.

        Returns:
            (n + extra * b, width) bytes: the vectors of the passages, one behind the other.
        """
        if not self.extra:
            return self._quantise(states)
        starts = counts.cumsum() - counts
        means: NDArray[np.float32] = np.add.reduceat(states, starts, axis=0)
        means /= counts[:, None]
        stored_means = self._quantise(means)
        known = self._vectors(stored_means, states.shape[1])
        is_mean = _means_among(counts)
        stored = np.empty((len(is_mean), stored_means.shape[1]), np.uint8)
        stored[is_mean] = stored_means
        stored[~is_mean] = self._quantise(states - np.repeat(known, counts, axis=0))
        return stored

    def decode(
        self, stored: NDArray[np.uint8], counts: NDArray[np.int64], dim: int
    ) -> NDArray[np.float32]:
        """Decode what `encode` made of passages with these counts of states; return (n, d)."""
        vectors = self._vectors(stored, dim)
        if not self.extra:
            return vectors
        is_mean = _means_among(counts)
        states = vectors[~is_mean]
        states += np.repeat(vectors[is_mean], counts, axis=0)
        return states

    def _quantise(self, vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Rotate and round each vector by itself: (n, d) to (n, width)."""
        dim = vectors.shape[1]
        padded = _padded(dim)
        if padded != dim:
            vectors = np.pad(vectors, [(0, 0), (0, padded - dim)])
        values = _rotate(vectors)
        begins = range(0, padded, GROUP)
        high = np.maximum.reduceat(values, begins, axis=1)
        low = np.minimum.reduceat(values, begins, axis=1)
        top = 1 << (self.bits - 1)
        scales = (np.where(high > -low, high, low) / -top).astype("<f2")
        values /= _spread(np.where(scales == 0, 1, scales).astype(np.float32), padded)
        rounded = np.clip(np.rint(values, out=values), -top, top - 1, out=values).astype(np.int8)
        packed = rounded.view(np.uint8) if self.bits == 8 else _pack(rounded)
        return np.concatenate([packed, scales.view(np.uint8)], axis=1)

    def _vectors(self, stored: NDArray[np.uint8], dim: int) -> NDArray[np.float32]:
        """Undo `_quantise`."""
        padded = _padded(dim)
        size = padded * self.bits // 8
        scales = np.ascontiguousarray(stored[:, size:]).view("<f2").astype(np.float32)
        spread = _spread(scales, padded)
        if self.bits == 8:
            values = stored[:, :size].view(np.int8) * spread
        else:
            values = PAIRS.take(stored[:, :size]).view(np.float32)
            values *= spread
        return _rotate(values)[:, :dim]


CODECS: dict[str, FloatCodec | RotatedCodec] = {
    "float16": FloatCodec(np.float16),
    "float32": FloatCodec(np.float32),
    "int8": RotatedCodec(8, extra=0),
    "int4": RotatedCodec(4, extra=1),
}
VERSION_1: dict[str, FloatCodec | RotatedCodec | IntCodec] = {
    **CODECS,
    "int8": IntCodec(8, None),
    "int4": IntCodec(4, INT4_GROUP),
}


def _padded(dim: int) -> int:
    return -(-dim // BLOCK) * BLOCK


def _means_among(counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of the vectors of passages with these counts of states are means, (n + b,)."""
    is_mean = np.zeros(int(counts.sum()) + len(counts), bool)
    is_mean[(counts + 1).cumsum() - counts - 1] = True
    return is_mean


def _spread(scales: NDArray[np.float32], padded: int) -> NDArray[np.float32]:
    """Return the scale of each value, (n, P)."""
    return np.repeat(scales, GROUP, axis=1)[:, :padded]


def _rotate(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rotate (n, P) block by block. One large product is faster than the six additions."""
    rotated: NDArray[np.float32] = vectors.reshape(-1, BLOCK) @ ROTATION
    return rotated.reshape(vectors.shape)


def _rotation() -> NDArray[np.float32]:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < BLOCK:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(BLOCK**0.5)


ROTATION = _rotation()


def _pack(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Put two values of -8 to 7 in a byte, the even one in the low half."""
    both = (values + 8).view("<u2")  # the even value in the low byte
    packed: NDArray[np.uint8] = (both | both >> 4).astype(np.uint8)
    return packed


_PAIRS = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1).astype(np.float32) - 8
PAIRS = _PAIRS.view(np.complex64)[:, 0]
"""The two values of each byte of int4, as one item, so that one look-up finds both."""
