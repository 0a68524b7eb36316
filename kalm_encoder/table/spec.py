"""The row format, version 2, and what a table records about the model that made it.

    id            string, unenforced primary key
    text          string, the raw passage (the column is absent with keep_text=False)
    text_hash     16 bytes, xxh3_128 of the rendered text, big endian
    num_tokens    int32, after truncation, with the prefix
    truncated     bool
    states_rR     list<fixed_size_list<…>>, one column per stored ratio R; d float16 or float32
                  values, or the bytes that codecs.py describes
    checksum_rR   uint64, xxh3_64 over id, num_tokens, truncated and the bytes of states_rR
    shard_id      string, the shard of the input that wrote the row
    checksum      uint64, xxh3_64 over id, text_hash and shard_id, which no other checksum covers

Metadata columns follow under their own names, and with them

    checksum_metadata  uint64, xxh3_64 over id and the values of the metadata columns

No field is nullable but the metadata columns. Tables of version 1 are read, resumed and changed as
well; they do not record in which dtype their states were computed, and keep no metadata. What a
reader must know about the whole table is a `TableSpec`; it is kept as JSON in the metadata of the
schema. Each ratio has its own checksum, so that a coarse read verifies what it reads without
touching the fine column. This module knows nothing of torch, files or commits; rows.py makes rows
of this format and reads them back.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from kalm_encoder.errors import InputError, TableError
from kalm_encoder.matryoshka import num_groups
from kalm_encoder.prompts import TEMPLATE
from kalm_encoder.table.codecs import CODECS, VERSION_1, FloatCodec, RotatedCodec
from kalm_encoder.table.codecs_v1 import IntCodec
from kalm_encoder.table.metadata import CHECKSUM, TYPES, Columns, check_columns
from kalm_encoder.version import __version__

FORMAT_VERSION = 2
"""Version of the tables that are begun now."""
VERSIONS = (1, FORMAT_VERSION)
"""Versions that can be read and changed."""
SPEC_KEY = "kalm.spec"
SPLIT_COLUMNS = (("doc_id", "string"), ("span_begin", "int64"), ("span_end", "int64"))
"""Metadata columns, the last ones, of a table whose documents were split: the id of the document,
the first character of the passage in its text, and the one behind its last."""
MIN_SPLIT = 32
"""Fewest tokens of a passage into which documents are split."""
PRIMARY_KEY = {"lance-schema:unenforced-primary-key": "true"}


@dataclass(frozen=True)
class TableSpec:
    """The record that a table keeps of the model and the settings that made its states.

    Attributes:
        model: Hub id or directory of the model, as the user named it.
        revision: Commit on the hub; None for a local directory.
        fingerprint: Hash of what decides states and scores in the checkpoint. A decoder may read
            the table only if its checkpoint has the same fingerprint.
        dim: Width d of a state.
        max_length: Number of tokens that passages were cut to.
        ratios: Stored ratios, finest first; each is a multiple of the first.
        store_dtype: "float16", "float32", "int8" or "int4".
        keep_text: Whether the raw text is stored.
        template: Passage template of the prompt.
        compute_dtype: "bfloat16" or "float32", in which the encoder computed. None before the first
            shard is committed, and in tables of version 1.
        metadata_columns: Name and type of each metadata column; see metadata.py.
        split: Most tokens of a passage and tokens of overlap, if documents were split into
            passages. None if they were passages in the corpus.
        files_hash: Hash of all bytes of the checkpoint's files. None in older tables, whose
            fingerprint it is.
        weights_hash: Hash of its weights alone, by which `kalm adopt` knows them again.
        format_version: Version of the row format.
        library_version: Version of kalm-preencode that created the table.

    Raises:
        InputError: If the ratios, the store dtype, the metadata columns or the lengths of splitting
            are impossible.
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
    compute_dtype: str | None = None
    metadata_columns: Columns = ()
    split: tuple[int, int] | None = None
    files_hash: str | None = None
    weights_hash: str | None = None
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
        check_columns(self.metadata_columns)
        if self.split:
            check_split(*self.split, self.max_length)

    @property
    def corpus_columns(self) -> Columns:
        """The metadata columns that come from the corpus."""
        return self.metadata_columns[: -len(SPLIT_COLUMNS)] if self.split else self.metadata_columns

    @property
    def metadata_names(self) -> list[str]:
        """Names of the metadata columns and, last, of their checksum; none if there are none."""
        names = [name for name, _ in self.metadata_columns]
        return [*names, CHECKSUM] if names else []

    @property
    def codec(self) -> FloatCodec | RotatedCodec | IntCodec:
        """The codec that turns states into stored values and back."""
        return (VERSION_1 if self.format_version == 1 else CODECS)[self.store_dtype]

    @property
    def bytes_per_token(self) -> float:
        """Theoretical minimum of storage: state bytes per passage token, over all stored ratios."""
        return sum(self.bytes_per_state / ratio for ratio in self.ratios)

    @property
    def bytes_per_state(self) -> int:
        """Number of bytes of one stored state, with its scales."""
        return np.dtype(self.codec.dtype).itemsize * self.codec.width(self.dim)

    def read_bytes(self, num_tokens: int, ratio: int | None) -> int:
        """Return how many bytes of states must be read to score one passage at a ratio.

        Raises:
            InputError: If the ratio cannot be made from what is stored.

        Example: A passage of 150 tokens with d = 640 is stored in float16 at ratios 4 and 32. Ratio
        4 reads 38 states, which are 48,640 bytes; ratio 8 is made from ratio 4 and reads the same;
        ratio 32 reads 5 states, which are 6,400 bytes.
        """
        vectors = num_groups(num_tokens, self.source_ratio(ratio)) + self.codec.extra
        return vectors * self.bytes_per_state

    def source_ratio(self, wanted: int | None) -> int:
        """Return the coarsest stored ratio that `wanted` can be made from (None: the finest).

        Raises:
            InputError: If `wanted` is not a multiple of any stored ratio.
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
        vector = pa.list_(pa.field("item", value, nullable=False), self.codec.width(self.dim))
        states = pa.list_(pa.field("item", vector, nullable=False))
        types = {"id": pa.string()} | ({"text": pa.string()} if self.keep_text else {})
        types |= {"text_hash": pa.binary(16), "num_tokens": pa.int32(), "truncated": pa.bool_()}
        for ratio in self.ratios:
            types |= {f"states_r{ratio}": states, f"checksum_r{ratio}": pa.uint64()}
        types |= {"shard_id": pa.string(), "checksum": pa.uint64()}
        fields = [
            pa.field(name, type, nullable=False, metadata=PRIMARY_KEY if name == "id" else None)
            for name, type in types.items()
        ]
        if self.metadata_columns:
            fields += [pa.field(name, TYPES[type]) for name, type in self.metadata_columns]
            fields.append(pa.field(CHECKSUM, pa.uint64(), nullable=False))
        return pa.schema(fields, metadata={SPEC_KEY: self.to_json()})

    def to_json(self) -> str:
        """Return this spec as the metadata of a schema holds it under SPEC_KEY."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_metadata(cls, metadata: dict[bytes, bytes] | None, uri: str) -> TableSpec:
        """Read the spec back from a schema's metadata.

        Raises:
            TableError: If this is not a passage table, or if its format has another version.
        """
        raw = (metadata or {}).get(SPEC_KEY.encode())
        if raw is None:
            raise TableError(f"{uri} is a Lance table, but not one that `kalm encode` made")
        fields = json.loads(raw)
        version = fields.get("format_version")
        if version not in VERSIONS:
            raise TableError(
                f"{uri} has format version {version}, and this kalm-preencode {__version__} reads "
                f"versions {' and '.join(map(str, VERSIONS))}. Install the version that wrote the "
                f"table ({fields.get('library_version')}), or encode the corpus again."
            )
        columns = tuple((name, type) for name, type in fields.get("metadata_columns", ()))
        split = tuple(fields["split"]) if fields.get("split") else None
        known = {"ratios": tuple(fields["ratios"]), "metadata_columns": columns, "split": split}
        return cls(**{**fields, **known})


def check_split(tokens: int, overlap: int, max_length: int) -> None:
    """Refuse lengths by which no document can be split well.

    Raises:
        InputError: If the passages would be tiny, longer than `max_length`, or mostly overlap.
    """
    if not MIN_SPLIT <= tokens <= max_length:
        raise InputError(
            f"--split {tokens} must be between {MIN_SPLIT} and the {max_length} tokens of "
            "--max-length"
        )
    if not 0 <= overlap <= tokens // 4:
        raise InputError(f"--overlap {overlap} must be between 0 and a quarter of --split {tokens}")
