"""Writes tests/golden/v1. Run once per format version; the files are then never written again.

python -m tests.golden.write_v1
"""

import json
import shutil
from pathlib import Path

import lance
import numpy as np

from kalm_encoder.pooling import PassageStates, num_groups
from kalm_encoder.rows import TableSpec, build_rows
from kalm_encoder.table import LIVE_TAG

FOLDER = Path(__file__).parent / "v1"
SPEC = TableSpec(
    model="golden",
    revision=None,
    fingerprint="0" * 64,
    dim=4,
    max_length=64,
    ratios=(2, 4),
    store_dtype="float16",
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


def main() -> None:
    table = FOLDER / "passages.lance"
    if FOLDER.exists() and any(FOLDER.iterdir()):
        raise SystemExit(f"{FOLDER} is there: golden files are written once")
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    rows = build_rows(SPEC, IDS, TEXTS, passages(), "000000-golden")
    dataset = lance.write_dataset(
        rows, table, data_storage_version="2.2", enable_stable_row_ids=True
    )
    dataset.tags.create(LIVE_TAG, dataset.version)
    expected = rows.select(["text_hash", "checksum_r2", "checksum_r4", "checksum"]).to_pydict()
    expected["text_hash"] = [h.hex() for h in expected["text_hash"]]
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=1))


if __name__ == "__main__":
    main()
