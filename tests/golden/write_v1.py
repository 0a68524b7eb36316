"""Writes tests/golden/v1. Run once per format version; the files are then never written again.

python -m tests.golden.write_v1
"""

import json
from dataclasses import replace
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa

from kalm_encoder.matryoshka import PackedStates, PassageStates, num_groups
from kalm_encoder.table.reader import LIVE_TAG
from kalm_encoder.table.rows import build_rows
from kalm_encoder.table.spec import TableSpec

FOLDER = Path(__file__).parent / "v1"
FILES = {"float16": "passages.lance", "int8": "int8.lance", "int4": "int4.lance"}
SPEC = TableSpec(
    model="golden",
    revision=None,
    fingerprint="0" * 64,
    dim=4,
    max_length=64,
    ratios=(2, 4),
    store_dtype="float16",
    format_version=1,
    library_version="0.1.0",
)
IDS = ["a", "b'\"\n", "ü漢", "d\x00e"]
TEXTS = ["one", "", "漢字 text", "four"]
TOKENS = [1, 4, 7, 64]


def passages() -> list[PassageStates]:
    """States that float16 holds exactly: multiples of 1/8."""
    made = []
    for row, n in enumerate(TOKENS):
        m = num_groups(n, 2)
        states = (np.arange(m * 4, dtype=np.float32).reshape(m, 4) - row) / 8
        made.append(PassageStates(states, n, n == 64))
    return made


def rows_of(dtype: str) -> pa.Table:
    """The rows of one file."""
    spec = replace(SPEC, store_dtype=dtype)
    return build_rows(spec, IDS, TEXTS, PackedStates.of(passages()), "000000-golden")


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for dtype, name in FILES.items():
        table = FOLDER / name
        if table.exists():
            print(f"{table} is there: golden files are written once")
            continue
        rows = rows_of(dtype)
        dataset = lance.write_dataset(
            rows, table, data_storage_version="2.2", enable_stable_row_ids=True
        )
        dataset.tags.create(LIVE_TAG, dataset.version)
        expected = rows.select(["text_hash", "checksum_r2", "checksum_r4", "checksum"]).to_pydict()
        expected["text_hash"] = [h.hex() for h in expected["text_hash"]]
        (FOLDER / f"{Path(name).stem}.json").write_text(json.dumps(expected, indent=1))


if __name__ == "__main__":
    main()
