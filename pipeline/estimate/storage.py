"""What a table of a corpus will take on disk, from a small real table of a sample.

State bytes follow from the lengths alone. What lies beside them (text, ids, checksums, offsets, and
how well Lance packs each) is measured: a sample is written as a table with random states, which are
no more compressible than real ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa

from kalm_encoder.matryoshka import PassageStates, num_groups
from kalm_encoder.table.location import Location
from kalm_encoder.table.rows import build_rows
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.passages import Passage
from pipeline.table.ledger import create_table

SAMPLE_BYTES = 64 << 20
"""Of states, in the sample table."""


@dataclass(frozen=True)
class RowCost:
    """Bytes a passage takes beside its states.

    Attributes:
        data: in the data files: what `kalm status` counts as bytes, less the states.
        index: in the indexes of ids and text. A vocabulary grows more slowly than its corpus, so
            this is too much for a corpus far bigger than the sample.
        rows: passages measured.
    """

    data: float
    index: float
    rows: int


def measure_rows(
    spec: TableSpec, examples: Sequence[tuple[Passage, int]], shard_size: int, seed: int
) -> RowCost:
    """Write passages as a table in a temporary folder and weigh it.

    Args:
        spec: of the table to come.
        examples: passages and their tokens, not cut; so many are used as fit in SAMPLE_BYTES.
        shard_size: rows a shard; each has an id that its rows share.
        seed: of the random states.
    """
    rng = np.random.default_rng(seed)
    tables: list[pa.Table] = []
    states = used = 0
    for start in range(0, len(examples), shard_size):
        some = []
        for passage, tokens in examples[start : start + shard_size]:
            n = min(tokens, spec.max_length)
            if used and states > SAMPLE_BYTES:
                break
            size = sum(num_groups(n, r) for r in spec.ratios) * spec.bytes_per_state
            states, used = states + size, used + 1
            shape = (num_groups(n, spec.ratios[0]), spec.dim)
            made = rng.standard_normal(shape, np.float32)
            some.append((passage, PassageStates(made, n, tokens > spec.max_length)))
        if some:
            ids, texts = [p.id for p, _ in some], [p.text for p, _ in some]
            shard = f"{start // shard_size:06d}-{rng.bytes(6).hex()}"
            tables.append(build_rows(spec, ids, texts, [s for _, s in some], shard))
    with tempfile.TemporaryDirectory() as folder:
        data, index = _weigh(pa.concat_tables(tables), spec, Path(folder, "sample.lance"))
    return RowCost((data - states) / used, index / used, used)


def _weigh(rows: pa.Table, spec: TableSpec, path: Path) -> tuple[int, int]:
    """Write a table and its indexes as a job does; return the bytes of data and of indexes."""
    create_table(Location(str(path)), spec.schema())
    dataset = lance.write_dataset(rows, str(path), mode="append")
    dataset.create_scalar_index("id", "BTREE")
    if spec.keep_text:
        dataset.create_scalar_index("text", "INVERTED", with_position=False)
    return _size(path / "data"), _size(path / "_indices")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
