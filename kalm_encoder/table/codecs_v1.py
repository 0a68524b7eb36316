"""The int8 and int4 of tables of version 1, which are still read, resumed and changed.

Both store bytes: first the values, then their float16 scales, little endian.

    int8  d signed bytes, then one scale per vector; value = byte x scale
    int4  ceil(d / 2) bytes, with the even dimension in the low four bits and 8 added to each value;
          then one scale per 64 dimensions; value = (four bits - 8) x scale

A scale is max(|x|) / 127 (int8) or max(|x|) / 7 (int4) over its dimensions, rounded to float16.
Values are rounded to nearest and clipped to +-127 or +-7. A scale of zero stands for zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

INT4_GROUP = 64
"""Number of dimensions that share a scale. Smaller groups are more exact and need more scales."""


@dataclass(frozen=True)
class IntCodec:
    """Stores each state by itself, as scaled integers of 8 or 4 bits.

    Attributes:
        bits: 8 or 4.
        group: Number of dimensions that share a scale; None for all.
        dtype: Type of the stored items.
        extra: Number of vectors that a passage has beside its states.
    """

    bits: int
    group: int | None
    dtype: type[np.uint8] = np.uint8
    extra: int = 0

    @property
    def top(self) -> int:
        """The largest integer: 127 or 7."""
        return (1 << (self.bits - 1)) - 1

    @property
    def limit(self) -> float:
        """The largest magnitude that can be stored."""
        return self.top * float(np.finfo(np.float16).max)

    def width(self, dim: int) -> int:
        """Return the number of bytes per vector, values and scales together."""
        return -(-dim * self.bits // 8) + 2 * self._groups(dim)

    def encode(self, states: NDArray[np.float32], counts: NDArray[np.int64]) -> NDArray[Any]:
        """Return (m, width) bytes."""
        m, dim = states.shape
        groups = self._groups(dim)
        size = self.group or dim
        padded = np.zeros((m, groups * size), np.float32)
        padded[:, :dim] = states
        grouped = padded.reshape(m, groups, size)
        scales = (np.abs(grouped).max(axis=2) / self.top).astype("<f2")
        divisor = np.where(scales == 0, 1, scales).astype(np.float32)[:, :, None]
        values = np.clip(np.rint(grouped / divisor), -self.top, self.top).astype(np.int8)
        values[scales == 0] = 0
        flat = values.reshape(m, -1)[:, :dim]
        packed = flat.view(np.uint8) if self.bits == 8 else _pack(flat)
        return np.concatenate([packed, scales.view(np.uint8).reshape(m, -1)], axis=1)

    def decode(
        self, stored: NDArray[Any], counts: NDArray[np.int64], dim: int
    ) -> NDArray[np.float32]:
        """Return (m, d) float32."""
        m, groups = len(stored), self._groups(dim)
        size = -(-dim * self.bits // 8)
        packed = np.ascontiguousarray(stored[:, :size])
        values = packed.view(np.int8) if self.bits == 8 else _unpack(packed, dim)
        scales = np.ascontiguousarray(stored[:, size:]).view("<f2").reshape(m, groups)
        wide = np.repeat(scales.astype(np.float32), self.group or dim, axis=1)[:, :dim]
        decoded: NDArray[np.float32] = values.astype(np.float32) * wide
        return decoded

    def _groups(self, dim: int) -> int:
        return -(-dim // (self.group or dim))


def _pack(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Put two values of -7 to 7 in a byte, the first in the low half."""
    m, dim = values.shape
    shifted = np.full((m, dim + dim % 2), 8, np.uint8)
    shifted[:, :dim] = (values + 8).astype(np.uint8)
    packed: NDArray[np.uint8] = shifted[:, 0::2] | (shifted[:, 1::2] << 4)
    return packed


def _unpack(packed: NDArray[np.uint8], dim: int) -> NDArray[np.int8]:
    both = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)
    return both[:, :dim].astype(np.int8) - 8
