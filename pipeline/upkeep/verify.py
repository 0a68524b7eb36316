"""Checks every row of a table: what `kalm verify` does. Finds all it can, stops at nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from kalm_encoder.errors import InputError, KalmError, first_line
from kalm_encoder.matryoshka import num_groups
from kalm_encoder.model.decoder import QueryDecoder
from kalm_encoder.model.encoder import PassageEncoder
from kalm_encoder.table.checksums import row_checksum, states_checksum, text_hash
from kalm_encoder.table.reader import PassageTable
from kalm_encoder.table.rows import states_arrays
from kalm_encoder.table.spec import TableSpec
from pipeline.run.job import EncodeJob, plan_job
from pipeline.table.claim import COMPLETE, STATE
from pipeline.table.duplicates import repeated_rows
from pipeline.table.finish import ROWS
from pipeline.table.ledger import NUM_ROWS
from pipeline.upkeep.compare import Comparison

BATCH_ROWS = 1024
SHOWN = 100
STATES_TOLERANCE = 1e-2
SCORE_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be; `id` is None where it concerns more than a row."""

    check: str
    detail: str
    id: str | None = None


@dataclass
class Report:
    """What was checked and found.

    Attributes:
        uri: of the table.
        version: that was checked.
        rows: that could be read.
        num_problems: all of them.
        problems: the first SHOWN.
        largest_state_error: relative L2 distance of stored to live states, where sampled.
        largest_score_error: difference of P(yes) between stored and live states, where sampled.
    """

    uri: str
    version: int
    rows: int = 0
    num_problems: int = 0
    problems: list[Problem] = field(default_factory=list)
    largest_state_error: float | None = None
    largest_score_error: float | None = None

    def add(self, check: str, detail: str, id: str | None = None) -> None:
        """Note a problem."""
        self.num_problems += 1
        if len(self.problems) < SHOWN:
            self.problems.append(Problem(check, detail, id))

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return asdict(self)


def verify(
    uri: str,
    *,
    version: int | str | None = None,
    storage_options: dict[str, str] | None = None,
    sample: int = 0,
    model: str | None = None,
    inputs: Sequence[str] = (),
) -> Report:
    """Check checksums, finite values, shapes, unique ids, the id index and the number of rows.

    Args:
        uri: of the table.
        version: None takes the tag `live`.
        storage_options: as Lance takes them.
        sample: encode so many rows again and compare states and P(yes).
        model: for the sample; None takes what the table records.
        inputs: corpus files; every passage of them must be there with its text, and no other.

    Raises:
        TableError: no such table or version.
        InputError: a sample was asked for of a table that keeps no text.
    """
    table = PassageTable.open(uri, version=version, storage_options=storage_options)
    if sample and not table.spec.keep_text:
        raise InputError(
            f"{uri} stores no text, so no row can be encoded again: leave out --sample"
        )
    report = Report(uri, table.version)
    for fragment in table.dataset.get_fragments():
        _check_fragment(fragment, table.spec, report)
    try:
        for rows in repeated_rows(table.dataset, "first"):
            repeated = table.dataset._take_rows(rows[:SHOWN].tolist(), columns=["id"])
            for id in repeated["id"].to_pylist():
                report.add("unique ids", "the id is there more than once", id)
    except _ENGINE_ERRORS as error:
        report.add("unique ids", f"ids cannot be read: {first_line(error)}")
    _check_count(table, report)
    _check_index(table, report)
    if inputs:
        _check_corpus(table, report, inputs, storage_options)
    if sample:
        _check_sample(table, report, sample, model or table.spec.model)
    return report


_ENGINE_ERRORS = (OSError, ValueError, RuntimeError, pa.ArrowException, pa.lib.ArrowException)


def _check_fragment(fragment: Any, spec: TableSpec, report: Report) -> None:
    try:
        for batch in fragment.to_batches(batch_size=BATCH_ROWS):
            report.rows += batch.num_rows
            for id, problem in bad_rows(pa.Table.from_batches([batch]), spec):
                report.add("rows", problem, id)
    except _ENGINE_ERRORS as error:
        report.add("files", f"fragment {fragment.fragment_id} cannot be read: {first_line(error)}")
    except BaseException as error:  # Lance panics on some damaged pages
        if type(error).__name__ != "PanicException":
            raise
        report.add("files", f"fragment {fragment.fragment_id} cannot be decoded: {error}")


def bad_rows(rows: pa.Table, spec: TableSpec) -> Iterator[tuple[str, str]]:
    """Yield (id, problem) of every row whose values are not those that were written."""
    rows = rows.combine_chunks()
    columns = {
        name: rows[name].to_pylist()
        for name in rows.schema.names
        if not name.startswith("states_r")
    }
    states = {r: states_arrays(spec, rows[f"states_r{r}"]) for r in spec.ratios}
    for i, id in enumerate(columns["id"]):
        tokens, cut = columns["num_tokens"][i], columns["truncated"][i]
        if columns["checksum"][i] != row_checksum(
            id, columns["text_hash"][i], columns["shard_id"][i]
        ):
            yield id, "id, text_hash or shard_id does not match its checksum"
        if spec.keep_text and columns["text_hash"][i] != text_hash(columns["text"][i]):
            yield id, "text does not match its hash"
        for ratio in spec.ratios:
            array = states[ratio][i]
            if columns[f"checksum_r{ratio}"][i] != states_checksum(id, tokens, cut, array):
                yield id, f"states_r{ratio}, num_tokens or truncated does not match its checksum"
            elif len(array) != num_groups(tokens, ratio):
                yield id, f"{len(array)} states at ratio {ratio} for {tokens} tokens"
            elif not np.isfinite(spec.codec.decode(array, spec.dim)).all():
                yield id, f"states_r{ratio} is not finite"


def _check_count(table: PassageTable, report: Report) -> None:
    """Compare the number of rows with what was recorded when the table was finished."""
    metadata = {k.decode(): v.decode() for k, v in table.dataset.schema.metadata.items()}
    if metadata.get(STATE) != COMPLETE:
        report.add("complete", f"version {table.version} is {metadata.get(STATE)}")
        return
    recorded = int(metadata[ROWS])
    if report.rows != recorded:
        report.add(
            "complete",
            f"{report.rows} rows could be read, {recorded} were recorded "
            f"({metadata[NUM_ROWS]} planned before rejects and repeated ids)",
        )


def _check_corpus(
    table: PassageTable,
    report: Report,
    inputs: Sequence[str],
    storage_options: dict[str, str] | None,
) -> None:
    """Compare ids and text hashes with the corpus; of a repeated id the first passage counts."""
    job = EncodeJob(
        inputs=tuple(inputs),
        uri=table.uri,
        model=table.spec.model,
        storage_options=storage_options,
    )
    changes = Comparison(job, plan_job(job), "first").changes
    if changes.new:
        report.add("corpus", f"{changes.new} passages of the corpus are not in the table")
    if changes.changed:
        report.add("corpus", f"{changes.changed} passages have another text in the corpus")
    if changes.missing:
        report.add("corpus", f"{len(changes.missing)} rows are of no passage of the corpus")


def _check_index(table: PassageTable, report: Report) -> None:
    """Look some ids up by the id index, as a query does."""
    rng = random.Random(0)
    total = table.dataset.count_rows()
    offsets = sorted(rng.sample(range(total), min(SHOWN, total)))
    try:
        ids = table.dataset.take(offsets, columns=["id"])["id"].to_pylist()
        table.take(ids)
    except (KalmError, *_ENGINE_ERRORS) as error:
        report.add("look-up", first_line(error))


def _check_sample(table: PassageTable, report: Report, sample: int, model: str) -> None:
    """Encode some rows again; compare states and P(yes)."""
    spec = table.spec
    total = table.dataset.count_rows()
    offsets = sorted(random.Random(sample).sample(range(total), min(sample, total)))
    rows = table.dataset.take(offsets, columns=["id", "text"])
    ids, texts = rows["id"].to_pylist(), rows["text"].to_pylist()
    encoder = PassageEncoder.load(model, revision=spec.revision, max_length=spec.max_length)
    decoder = QueryDecoder.load(model, revision=spec.revision)
    if decoder.fingerprint != spec.fingerprint:
        report.add("fingerprint", f"{model} is not the model that made this table")
        return
    live = encoder.encode(texts, ratio=spec.ratios[0])
    state_errors, score_errors = [0.0], [0.0]
    for id, text, fresh, stored in zip(ids, texts, live, table.take(ids), strict=True):
        if fresh.states.shape != stored.states.shape:
            report.add("sample", f"shape {stored.states.shape}, live {fresh.states.shape}", id)
            continue
        difference = float(np.linalg.norm(stored.states.astype(np.float32) - fresh.states))
        state_errors.append(difference / max(1e-12, float(np.linalg.norm(fresh.states))))
        query = " ".join(text.split()[:8])
        old, new = _scores(decoder, query, [stored.states, fresh.states])
        score_errors.append(abs(old - new))
        if state_errors[-1] > STATES_TOLERANCE or score_errors[-1] > SCORE_TOLERANCE:
            detail = f"states differ by {state_errors[-1]:.2g}, P(yes) by {score_errors[-1]:.2g}"
            report.add("sample", detail, id)
    report.largest_state_error = max(state_errors)
    report.largest_score_error = max(score_errors)


def _scores(decoder: QueryDecoder, query: str, states: Sequence[Any]) -> tuple[float, float]:
    """Return P(yes) of a query against stored and live states."""
    (old, _), (new, _) = decoder.score(query, [np.asarray(s, np.float32) for s in states])
    return old, new
