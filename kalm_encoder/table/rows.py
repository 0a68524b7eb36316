"""The row format, version 1: what a table records, and passages to rows; back in row_reader.py.

    id            string, unenforced primary key
    text          string, raw passage (absent with keep_text=False)
    text_hash     16 bytes, xxh3_128 of the rendered text, big endian
    num_tokens    int32, after truncation, prefix included
    truncated     bool
    states_rR     list<fixed_size_list<…>>, one column a stored ratio R; d float16 or float32,
                  or the bytes that codecs.py describes
    checksum_rR   uint64, xxh3_64 over id, num_tokens, truncated and the bytes of states_rR
    shard_id      string, which shard of which input wrote the row
    checksum      uint64, xxh3_64 over id, text_hash and shard_id: what no states column covers

No field is nullable. What a reader must know of the whole table is a `TableSpec`, kept as JSON in
the schema metadata. Each ratio has a checksum of its own, so that a coarse read verifies what it
reads without touching the fine column. Nothing here knows torch, files or commits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kalm_encoder.errors import InputError, TableError
from kalm_encoder.matryoshka import PassageStates, coarsen, num_groups
from kalm_encoder.prompts import TEMPLATE
from kalm_encoder.table.checksums import row_checksum, states_checksum, text_hash
from kalm_encoder.table.codecs import CODECS, FloatCodec, IntCodec
from kalm_encoder.version import __version__

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT_VERSION = 1
SPEC_KEY = "kalm.spec"
PRIMARY_KEY = {"lance-schema:unenforced-primary-key": "true"}


@dataclass(frozen=True)
class TableSpec:
    """What a table records of the model and the settings that made its states.

    Attributes:
        model: hub id or directory the states were made with, as the user named it.
        revision: hub commit; None for a local directory.
        fingerprint: of the checkpoint's files; decides whether a decoder may read the table.
        dim: width d of a state.
        max_length: tokens a passage was cut to.
        ratios: stored ratios, finest first; each a multiple of the first.
        store_dtype: "float16", "float32", "int8" or "int4".
        keep_text: whether the raw text is stored.
        template: passage template.
        format_version: of the row format.
        library_version: of kalm-preencode that created the table.
    """

    model: str
    revision: str | None
    fingerprint: str
    dim: int
    max_length: int
    ratios: tuple[int, ...]
    store_dtype: str = "float16"
    keep_text: bool = True
    template: str = TEMPLATE
    format_version: int = FORMAT_VERSION
    library_version: str = __version__

    def __post_init__(self) -> None:
        ratios = list(self.ratios)
        if not ratios or ratios != sorted(set(ratios)) or ratios[0] < 1:
            raise InputError(f"ratios {ratios} must be different positive numbers, finest first")
        if odd := [r for r in ratios if r % ratios[0]]:
            raise InputError(f"ratio {odd[0]} is not a multiple of the finest ratio {ratios[0]}")
        if self.store_dtype not in CODECS:
            raise InputError(f"store dtype {self.store_dtype!r} is not one of {', '.join(CODECS)}")

    @property
    def codec(self) -> FloatCodec | IntCodec:
        """How the states lie on disk."""
        return CODECS[self.store_dtype]

    @property
    def bytes_per_token(self) -> float:
        """The storage floor: state bytes a passage token, all stored ratios together."""
        return sum(self.bytes_per_state / ratio for ratio in self.ratios)

    @property
    def bytes_per_state(self) -> int:
        """Bytes of one stored state, scales included."""
        return np.dtype(self.codec.dtype).itemsize * self.codec.width(self.dim)

    def read_bytes(self, num_tokens: int, ratio: int | None) -> int:
        """Return the state bytes that reading one passage at a ratio takes from the store.

        Raises:
            InputError: the ratio cannot be made from what is stored.

        Example: 150 tokens, d = 640 in float16, stored at 4 and 32: 38 states, 48,640 bytes at
        ratio 4 and also at 8, which is made from 4; 5 states, 6,400 bytes at 32.
        """
        return num_groups(num_tokens, self.source_ratio(ratio)) * self.bytes_per_state

    def source_ratio(self, wanted: int | None) -> int:
        """Return the coarsest stored ratio that `wanted` can be made from (None: the finest).

        Raises:
            InputError: `wanted` is a multiple of no stored ratio.
        """
        if wanted is None:
            return self.ratios[0]
        fitting = [r for r in self.ratios if wanted >= r and wanted % r == 0]
        if not fitting:
            raise InputError(
                f"ratio {wanted} is not a multiple of a stored ratio "
                f"({', '.join(map(str, self.ratios))})"
            )
        return fitting[-1]

    def schema(self) -> pa.Schema:
        """Return the Arrow schema of the table, with this spec in its metadata."""
        value = pa.from_numpy_dtype(np.dtype(self.codec.dtype))
        width = self.codec.width(self.dim)
        vector = pa.list_(pa.field("item", value, nullable=False), width)
        states = pa.list_(pa.field("item", vector, nullable=False))
        fields = [pa.field("id", pa.string(), metadata=PRIMARY_KEY)]
        if self.keep_text:
            fields.append(pa.field("text", pa.string()))
        fields.append(pa.field("text_hash", pa.binary(16)))
        fields.append(pa.field("num_tokens", pa.int32()))
        fields.append(pa.field("truncated", pa.bool_()))
        for ratio in self.ratios:
            fields.append(pa.field(f"states_r{ratio}", states))
            fields.append(pa.field(f"checksum_r{ratio}", pa.uint64()))
        fields.append(pa.field("shard_id", pa.string()))
        fields.append(pa.field("checksum", pa.uint64()))
        metadata = {SPEC_KEY: json.dumps(asdict(self), sort_keys=True)}
        return pa.schema([f.with_nullable(False) for f in fields], metadata=metadata)

    @classmethod
    def from_metadata(cls, metadata: dict[bytes, bytes] | None, uri: str) -> TableSpec:
        """Read the spec back from a schema's metadata.

        Raises:
            TableError: not a passage table, or of a format this version cannot read.
        """
        raw = (metadata or {}).get(SPEC_KEY.encode())
        if raw is None:
            raise TableError(f"{uri} is a Lance table, but not one that `kalm encode` made")
        fields = json.loads(raw)
        version = fields.get("format_version")
        if version != FORMAT_VERSION:
            raise TableError(
                f"{uri} has format version {version}, this kalm-preencode {__version__} reads "
                f"{FORMAT_VERSION}. Install the version that wrote it "
                f"({fields.get('library_version')}), or encode again."
            )
        return cls(**{**fields, "ratios": tuple(fields["ratios"])})


def build_rows(
    spec: TableSpec,
    ids: Sequence[str],
    texts: Sequence[str],
    passages: Sequence[PassageStates],
    shard_id: str,
    *,
    hashes: Sequence[bytes] | None = None,
) -> pa.Table:
    """Turn encoded passages into rows of the table.

    Args:
        spec: the table's.
        ids: one a passage.
        texts: raw texts, not rendered.
        passages: float32 states at the finest ratio, all within the codec's limit.
        shard_id: recorded with every row.
        hashes: of the rendered texts, where the texts themselves are not at hand.

    Returns:
        A table with `spec.schema()`.
    """
    schema = spec.schema()
    n = len(ids)
    hashes = [text_hash(t) for t in texts] if hashes is None else hashes
    columns: dict[str, Any] = {
        "id": pa.array(ids, pa.string()),
        "text_hash": pa.array(hashes, pa.binary(16)),
        "num_tokens": pa.array([p.num_tokens for p in passages], pa.int32()),
        "truncated": pa.array([p.truncated for p in passages], pa.bool_()),
        "shard_id": pa.array([shard_id] * n, pa.string()),
        "checksum": pa.array(
            [row_checksum(i, h, shard_id) for i, h in zip(ids, hashes, strict=True)], pa.uint64()
        ),
    }
    if spec.keep_text:
        columns["text"] = pa.array(texts, pa.string())
    for ratio in spec.ratios:
        arrays = [
            spec.codec.encode(coarsen(p.states, p.num_tokens, spec.ratios[0], ratio))
            for p in passages
        ]
        sums = [
            states_checksum(i, p.num_tokens, p.truncated, a)
            for i, p, a in zip(ids, passages, arrays, strict=True)
        ]
        columns[f"states_r{ratio}"] = _ragged(arrays, schema.field(f"states_r{ratio}").type)
        columns[f"checksum_r{ratio}"] = pa.array(sums, pa.uint64())
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _ragged(arrays: Sequence[NDArray[Any]], type: pa.DataType) -> pa.Array:
    """Build a list<fixed_size_list> column from (m_i, d) arrays."""
    offsets = np.cumsum([0, *(len(a) for a in arrays)])
    flat = np.concatenate(arrays).reshape(-1) if arrays else np.empty(0, np.float32)
    values = pa.array(flat, type.value_type.value_type)
    vectors = pa.FixedSizeListArray.from_arrays(values, type=type.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), vectors, type=type)
