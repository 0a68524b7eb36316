"""Reads the states of a passage table as docs/table-format.md says, without this project."""

import json

import lance
import numpy as np

HADAMARD = np.array([[(-1.0) ** (i & j).bit_count() for j in range(64)] for i in range(64)]) / 8


def read(path, ratio):
    """Return the states of each id, (m, d), at a ratio that the table stores."""
    dataset = lance.dataset(str(path)).checkout_version("live")
    spec = json.loads(dataset.schema.metadata[b"kalm.spec"])
    rows = dataset.to_table(columns=["id", f"states_r{ratio}"]).to_pylist()
    return {row["id"]: decode(np.array(row[f"states_r{ratio}"]), spec) for row in rows}


def decode(stored, spec):
    dtype, dim, old = spec["store_dtype"], spec["dim"], spec["format_version"] == 1
    if dtype in ("float16", "float32"):
        return stored
    stored = stored.astype(np.uint8)
    values = dim if old else -(-dim // 64) * 64
    size = values if dtype == "int8" else -(-values // 2)
    shared = (values if dtype == "int8" else 64) if old else 128
    scales = np.repeat(stored[:, size:].copy().view("<f2").astype(float), shared, axis=1)
    if dtype == "int8":
        integers = stored[:, :size].copy().view(np.int8)
    else:
        halves = np.stack([stored[:, :size] & 15, stored[:, :size] >> 4], axis=2)
        integers = halves.reshape(len(stored), -1)[:, :values].astype(int) - 8
    vectors = integers * scales[:, :values]
    if old:
        return vectors
    vectors = (vectors.reshape(-1, 64) @ HADAMARD).reshape(vectors.shape)[:, :dim]
    return vectors if dtype == "int8" else vectors[:1] + vectors[1:]
