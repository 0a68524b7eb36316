"""Writes the tables in tests/golden/v1 and v2. They are written once and never again.

python -m tests.golden.write
"""

import hashlib
import json
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa

from kalm_encoder.matryoshka import PackedStates, PassageStates, num_groups
from kalm_encoder.table.reader import LIVE_TAG
from kalm_encoder.table.rows import build_rows
from kalm_encoder.table.spec import TableSpec

VERSIONS = (1, 2)
FILES = {"float16": "passages.lance", "int8": "int8.lance", "int4": "int4.lance"}
DIMS = {1: 4, 2: 192}
"""Version 2 rotates 64 dimensions together and gives 128 of them a scale: 192 need two."""
IDS = ["a", "b'\"\n", "ü漢", "d\x00e"]
TEXTS = ["one", "", "漢字 text", "four"]
TOKENS = [1, 4, 7, 64]


def path_of(version: int, dtype: str) -> Path:
    return Path(__file__).parent / f"v{version}" / FILES[dtype]


def spec_of(version: int, dtype: str) -> TableSpec:
    return TableSpec(
        model="golden",
        revision=None,
        fingerprint="0" * 64,
        dim=DIMS[version],
        max_length=64,
        ratios=(2, 4),
        store_dtype=dtype,
        compute_dtype=None if version == 1 else "float32",
        format_version=version,
        library_version="0.1.0",
    )


def passages(version: int) -> list[PassageStates]:
    """States that float16 holds exactly: multiples of 1/8.

    Those of version 2 are small, so that a rotation rounds nothing, whatever the order of its sums.
    """
    made = []
    for row, n in enumerate(TOKENS):
        m, dim = num_groups(n, 2), DIMS[version]
        if version == 1:
            eighths = np.arange(m * dim) - row
        else:
            drawn = hashlib.shake_128(bytes([row])).digest(m * dim)
            eighths = np.frombuffer(drawn, np.uint8).astype(int) % 17 - 8
        states = eighths.reshape(m, dim).astype(np.float32) / 8
        made.append(PassageStates(states, n, n == 64))
    return made


def rows_of(version: int, dtype: str) -> pa.Table:
    """The rows of one file."""
    packed = PackedStates.of(passages(version))
    return build_rows(spec_of(version, dtype), IDS, TEXTS, packed, "000000-golden")


def main() -> None:
    for version in VERSIONS:
        for dtype in FILES:
            table = path_of(version, dtype)
            if table.exists():
                print(f"{table} is there: golden files are written once")
                continue
            table.parent.mkdir(exist_ok=True)
            rows = rows_of(version, dtype)
            dataset = lance.write_dataset(
                rows, table, data_storage_version="2.2", enable_stable_row_ids=True
            )
            dataset.tags.create(LIVE_TAG, dataset.version)
            expected = rows.select(
                ["text_hash", "checksum_r2", "checksum_r4", "checksum"]
            ).to_pydict()
            expected["text_hash"] = [h.hex() for h in expected["text_hash"]]
            table.with_suffix(".json").write_text(json.dumps(expected, indent=1))


if __name__ == "__main__":
    main()
