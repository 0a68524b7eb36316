"""A table whose model was edited and computes the same: it takes over the model's new fingerprint.

The weights must be those that made the states. Rows that are encoded again must come out as they
are stored, since an edit of the configuration or the tokenizer may change what the same weights
compute.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from kalm_encoder.errors import CheckpointError, InputError, MismatchError
from kalm_encoder.model.checkpoint import Checkpoint, resolve
from kalm_encoder.table.location import Location
from kalm_encoder.table.reader import PassageTable
from kalm_encoder.table.spec import SPEC_KEY, TableSpec
from pipeline.table.claim import COMPLETE, STATE
from pipeline.table.finish import SealedTable
from pipeline.table.publish import publish
from pipeline.upkeep.verification.report import Report
from pipeline.upkeep.verification.sample import compare_sample

logger = logging.getLogger(__name__)


def adopt(
    location: Location, model: str, *, revision: str | None = None, sample: int = 100
) -> Report | None:
    """Let a table belong to a model with the same weights, and publish it.

    Args:
        location: Address of a complete table that stores its texts.
        model: Hub id or directory of the model.
        revision: Revision of the hub id.
        sample: Number of rows to encode again.

    Returns:
        What the comparison of the sample found; None if the table belongs to the model already.

    Raises:
        InputError: If the table is not complete, stores no text, or the sample is empty.
        MismatchError: If the weights are others, or rows come out differently; nothing changed.
        CheckpointError: If it cannot be known which weights made the table.
    """
    if sample < 1:
        raise InputError(f"--sample {sample} must be at least 1: some rows must be encoded again")
    claim, files = SealedTable(location), resolve(model, revision)
    spec = claim.spec
    if files.made(spec.fingerprint, spec.files_hash) and spec.files_hash is not None:
        return None
    if not spec.keep_text:
        raise InputError(
            f"{location} stores no text, so no row can be encoded again: encode the corpus again"
        )
    known = spec.weights_hash or _weights_of_old(spec, files)
    if known != files.weights_hash:
        raise MismatchError(
            "weights",
            f"the weights of {model} are not those that made {location} (sha256 "
            f"{files.weights_hash}, there {known}): encode the corpus with --new-generation",
        )
    table = PassageTable.open(location.uri, storage_options=location.options)
    report = Report(location.uri, table.version)
    compare_sample(table, report, files, sample, spec.compute_dtype)
    if report.num_problems:
        first = report.problems[0]
        raise MismatchError(
            "fingerprint",
            f"{report.num_problems} of {sample} rows of {location} come out differently with "
            f"{model}, such as {first.id!r}: {first.detail}. Its configuration or tokenizer is not "
            "what made the table: use the one that did, or encode with --new-generation",
        )
    claim.begin_change(rows=False)
    adopted = replace(
        spec,
        model=files.recorded_name,
        revision=files.revision,
        fingerprint=files.fingerprint,
        files_hash=files.files_hash,
        weights_hash=files.weights_hash,
    )
    claim.change({SPEC_KEY: adopted.to_json(), STATE: COMPLETE})
    publish(location)
    return report


def _weights_of_old(spec: TableSpec, files: Checkpoint) -> str:
    """Return the hash of the weights of a table that does not record it.

    Raises:
        CheckpointError: If the files that made the table are not to be had.
    """
    if files.made(spec.fingerprint, spec.files_hash):
        return files.weights_hash
    try:
        old = resolve(spec.model, spec.revision)
        if old.made(spec.fingerprint, spec.files_hash):
            return old.weights_hash
        why = "its files are others now"
    except CheckpointError as error:
        why = str(error)
    raise CheckpointError(
        f"the table does not record its weights, and they cannot be read from the model that made "
        f"it, {spec.model} (revision {spec.revision or 'local'}): {why}. Put those files back, or "
        "encode the corpus again"
    )
