"""Measures what a table takes on disk beside its states, on a small real table of a sample.

The bytes of the states follow from the lengths alone. What lies beside them (text, ids, checksums,
offsets, and how well Lance packs each) is measured: a sample is written as a table with random
states, which are no more compressible than real ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import lance
import numpy as np

from kalm_encoder.matryoshka import PackedStates, PassageStates, num_groups
from kalm_encoder.table.location import Location
from kalm_encoder.table.rows import build_rows
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.passages import Passage
from pipeline.table.fragments import write_once

MAX_STATE_BYTES = 64 << 20
"""Limits the states in the sample table."""


def measure_rows(
    spec: TableSpec, examples: Sequence[tuple[Passage, int]], seed: int
) -> tuple[float, float]:
    """Write passages as a table in a temporary folder and weigh it.

    Args:
        spec: Spec of the table to come.
        examples: Passages and their tokens, not cut; as many are used as fit in MAX_STATE_BYTES,
            but at least one.
        seed: Seed of the random states.

    Returns:
        Bytes per passage in the data files (what `kalm status` counts) less those of its states,
        and in the indexes of ids and text. A vocabulary grows more slowly than its corpus, so the
        indexes of a corpus far bigger than the sample take less.
    """
    rng = np.random.default_rng(seed)
    kept = [min(tokens, spec.max_length) for _, tokens in examples]
    sizes = [sum(spec.read_bytes(n, ratio) for ratio in spec.ratios) for n in kept]
    used = max(1, sum(size <= MAX_STATE_BYTES for size in accumulate(sizes)))
    states = []
    for n, (_, tokens) in zip(kept[:used], examples, strict=False):
        made = rng.standard_normal((num_groups(n, spec.ratios[0]), spec.dim), np.float32)
        states.append(PassageStates(made, n, tokens > spec.max_length))
    passages = [passage for passage, _ in examples[:used]]
    ids, texts = [p.id for p in passages], [p.text for p in passages]
    rows = build_rows(spec, ids, texts, PackedStates.of(states), f"000000-{rng.bytes(6).hex()}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sample.lance")
        write_once(spec.schema().empty_table(), Location(str(path)), spec.schema())
        dataset = lance.write_dataset(rows, str(path), mode="append")
        dataset.create_scalar_index("id", "BTREE")
        if spec.keep_text:
            dataset.create_scalar_index("text", "INVERTED", with_position=False)
        data, index = _folder_bytes(path / "data"), _folder_bytes(path / "_indices")
    return (data - sum(sizes[:used])) / used, index / used


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
