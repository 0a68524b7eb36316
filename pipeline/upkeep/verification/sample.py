"""Encodes some rows of a table again and compares states and scores with what is stored."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa

from kalm_encoder.model.checkpoint import Checkpoint, resolve
from kalm_encoder.model.decoder import QueryDecoder
from kalm_encoder.model.encoder import PassageEncoder
from kalm_encoder.table.reader import PassageTable
from pipeline.upkeep.verification.report import Report

STATES_TOLERANCE = {"float32": 1e-2, "bfloat16": 6e-2}
"""Largest relative L2 distance of stored states from newly encoded ones in the table's store dtype,
beside what that dtype rounds; by the less exact of the dtypes that both were computed in. Batches
differ in shape, so the last bits differ even with the same model."""
SCORE_TOLERANCE = {"float32": 2e-2, "bfloat16": 5e-2}
"""Largest difference of P(yes) between stored and newly encoded states, by the same."""
QUERY_WORDS = 8
"""Words from the start of a passage that serve as its query when scores are compared."""


def check_sample(
    table: PassageTable, report: Report, sample: int, model: str, dtype: str | None
) -> None:
    """Encode some rows again and compare states and P(yes), if this model made the table."""
    spec = table.spec
    files = resolve(model, spec.revision)
    if not files.made(spec.fingerprint, spec.files_hash):
        report.add("fingerprint", f"{model} is not the model that made this table")
        return
    compare_sample(table, report, files, sample, dtype or spec.compute_dtype)


def compare_sample(
    table: PassageTable, report: Report, files: Checkpoint, sample: int, dtype: str | None
) -> None:
    """Encode some rows again with any model and compare states and P(yes)."""
    spec = table.spec
    decoder = QueryDecoder(files, dtype=dtype)
    encoder = PassageEncoder(files, dtype=dtype, max_length=spec.max_length)
    computed = (spec.compute_dtype, encoder.compute_dtype)
    coarser = "bfloat16" if "bfloat16" in computed else "float32"
    rows = some_rows(table, sample, ["id", "text"])
    ids, texts = rows["id"].to_pylist(), rows["text"].to_pylist()
    passages = zip(encoder.encode(texts, ratio=spec.ratios[0]), table.take(ids), strict=True)
    report.largest_state_error = report.largest_score_error = 0.0
    for id, text, (fresh, stored) in zip(ids, texts, passages, strict=True):
        old, exact = stored.states.astype(np.float32), fresh.states
        if exact.shape != old.shape:
            report.add("sample", f"shape {old.shape}, encoded again {exact.shape}", id)
            continue
        # Both sides have the rounding of the table's codec, so that few bits are no difference.
        counts = np.array([len(exact)])
        new = spec.codec.decode(spec.codec.encode(exact, counts), counts, spec.dim)
        norm = max(1e-12, float(np.linalg.norm(exact)))
        state_error = float(np.linalg.norm(old - new)) / norm
        rounding = float(np.linalg.norm(new - exact)) / norm
        query = " ".join(text.split()[:QUERY_WORDS])
        (score, _), (expected, _) = decoder.score(query, [old, new])
        score_error = abs(score - expected)
        most = STATES_TOLERANCE[coarser] + rounding
        if state_error > most or score_error > SCORE_TOLERANCE[coarser]:
            detail = f"states differ by {state_error:.2g}, P(yes) by {score_error:.2g}"
            report.add("sample", detail, id)
        report.largest_state_error = max(report.largest_state_error, state_error)
        report.largest_score_error = max(report.largest_score_error, score_error)


def some_rows(table: PassageTable, count: int, columns: list[str]) -> pa.Table:
    """Return rows at random, the same ones each time, in the order of the table."""
    total = len(table)
    offsets = random.Random(count).sample(range(total), min(count, total))
    return table.dataset.take(sorted(offsets), columns=columns)
