"""Checks every row of a table: what `kalm verify` does. It reports all problems and raises none."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from kalm_encoder.errors import InputError, KalmError, first_line
from kalm_encoder.model import checkpoint
from kalm_encoder.model.decoder import QueryDecoder
from kalm_encoder.model.encoder import PassageEncoder
from kalm_encoder.table.checksums import row_checksum, text_hash
from kalm_encoder.table.location import Location, address
from kalm_encoder.table.metadata import damaged_metadata
from kalm_encoder.table.reader import PassageTable
from kalm_encoder.table.rows import verified_rows
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.inputs import expand_inputs
from pipeline.corpus.passages import FieldOptions
from pipeline.corpus.shards import plan_shards
from pipeline.corpus.splitting import Splitter
from pipeline.table.claim import COMPLETE, STATE, metadata_of
from pipeline.table.duplicates import repeated_rows
from pipeline.table.erasures import erased_ids
from pipeline.table.finish import ROWS
from pipeline.table.ledger import NUM_ROWS
from pipeline.upkeep.compare import compare, corpus_of

BATCH_ROWS = 1024
"""Rows that are in memory at the same time."""
SHOWN = 100
"""Most problems that a report lists, and rows that are looked up by id."""
STATES_TOLERANCE = {"float32": 1e-2, "bfloat16": 6e-2}
"""Largest relative L2 distance of stored states from newly encoded ones in the table's store dtype,
beside what that dtype rounds; by the less exact of the dtypes that both were computed in. Batches
differ in shape, so the last bits differ even with the same model."""
SCORE_TOLERANCE = {"float32": 2e-2, "bfloat16": 5e-2}
"""Largest difference of P(yes) between stored and newly encoded states, by the same."""
QUERY_WORDS = 8
"""Words from the start of a passage that serve as its query when scores are compared."""
ENGINE_ERRORS = (KalmError, OSError, ValueError, RuntimeError, pa.ArrowException)


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    Attributes:
        check: Name of the check that found it.
        detail: What is wrong.
        id: Id of the row; None if the problem concerns more than one row.
    """

    check: str
    detail: str
    id: str | None = None


@dataclass
class Report:
    """The report of a verification: what was checked and found.

    Attributes:
        uri: Address of the table.
        version: Version that was checked.
        rows: Number of rows that could be read.
        num_problems: Number of all problems.
        problems: The first SHOWN of them.
        largest_state_error: Largest relative L2 distance of stored states from newly encoded ones
            in the same store dtype; None without a sample.
        largest_score_error: Largest difference of P(yes) between the two; None without a sample.
    """

    uri: str
    version: int
    rows: int = 0
    num_problems: int = 0
    problems: list[Problem] = field(default_factory=list)
    largest_state_error: float | None = None
    largest_score_error: float | None = None

    def add(self, check: str, detail: str, id: str | None = None) -> None:
        """Count a problem, and list it if there is room."""
        self.num_problems += 1
        if len(self.problems) < SHOWN:
            self.problems.append(Problem(check, detail, id))


def verify(
    uri: str,
    *,
    version: int | str | None = None,
    storage_options: dict[str, str] | None = None,
    sample: int = 0,
    model: str | None = None,
    dtype: str | None = None,
    inputs: Sequence[str] = (),
    fields: FieldOptions | None = None,
) -> Report:
    """Check checksums, finite values, shapes, unique ids, the id index and the number of rows.

    Args:
        uri: Address of the table.
        version: Version number or tag; None takes the tag `live`.
        storage_options: Options of the store, as Lance names them.
        sample: Number of rows to encode again and compare, in states and in P(yes).
        model: Model that encodes the sample and splits documents; None takes the one that the
            table records.
        dtype: Dtype in which the sample is encoded and scored; None takes the one that the table
            records, or what suits the device.
        inputs: Corpus files. The table must hold their passages with the same texts and metadata,
            and no others.
        fields: How the files are read, as when the table was encoded.

    Raises:
        TableError: If there is no such table or version.
        InputError: If a sample was asked for and the table stores no text, or an input is bad.
    """
    table = PassageTable.open(uri, version=version, storage_options=storage_options)
    if sample and not table.spec.keep_text:
        raise InputError(
            f"{uri} stores no text, so no row can be encoded again: leave out --sample"
        )
    report = Report(uri, table.version)
    _check_rows(table, report)
    with _engine_errors_are_problems(report, "unique ids", "ids cannot be read"):
        for repeated in repeated_rows(table.dataset, "first"):
            shown = table.dataset._take_rows(repeated[:SHOWN].tolist(), columns=["id"])
            for id in shown["id"].to_pylist():
                report.add("unique ids", "the id is there more than once", id)
    _check_count(table, report)
    # Queries look rows up through the id index, which the checks above do not read.
    with _engine_errors_are_problems(report, "look-up", "rows cannot be looked up by id"):
        table.take(_some_rows(table, SHOWN, ["id"])["id"].to_pylist())
    if inputs:
        split = None
        if table.spec.split:
            files = checkpoint.resolve(model or table.spec.model, table.spec.revision)
            split = Splitter.of(table.spec, files.tokenizer())
        _check_corpus(table, report, inputs, storage_options, fields or FieldOptions(), split)
    if sample:
        _check_sample(table, report, sample, model or table.spec.model, dtype)
    return report


@contextmanager
def _engine_errors_are_problems(report: Report, check: str, what: str) -> Iterator[None]:
    """Report an error of the engine in the `with` block as a problem."""
    try:
        yield
    except BaseException as error:
        # Lance panics on some damaged pages. The panic is no Exception and cannot be imported.
        if not isinstance(error, ENGINE_ERRORS) and type(error).__name__ != "PanicException":
            raise
        report.add(check, f"{what}: {first_line(error)}")


def _check_rows(table: PassageTable, report: Report) -> None:
    """Read all rows, fragment by fragment, so that a damaged file hides no other."""
    for fragment in table.dataset.get_fragments():
        what = f"fragment {fragment.fragment_id} cannot be read"
        with _engine_errors_are_problems(report, "files", what):
            for batch in fragment.to_batches(batch_size=BATCH_ROWS):
                report.rows += batch.num_rows
                for id, problem in _bad_rows(pa.Table.from_batches([batch]), table.spec):
                    report.add("rows", problem, id)


def _bad_rows(rows: pa.Table, spec: TableSpec) -> Iterator[tuple[str, str]]:
    """Yield the id and the problem of every row whose values are not those that were written."""
    columns = [rows[name].to_pylist() for name in ("id", "text_hash", "shard_id", "checksum")]
    for id, hash, shard, checksum in zip(*columns, strict=True):
        if checksum != row_checksum(id, hash, shard):
            yield id, "id, text_hash or shard_id does not match its checksum"
    if spec.metadata_columns:
        for id in damaged_metadata(rows.select(["id", *spec.metadata_names])):
            yield id, "metadata do not match their checksum"
    if spec.keep_text:
        for id, hash, text in zip(*columns[:2], rows["text"].to_pylist(), strict=True):
            if hash != text_hash(text):
                yield id, "text does not match its hash"
    for ratio in spec.ratios:
        for id, passage in verified_rows(spec, rows, ratio):
            if passage is None:
                yield id, f"states_r{ratio}, num_tokens or truncated does not match its checksum"
            elif not np.isfinite(passage.states).all():
                yield id, f"states_r{ratio} is not finite"


def _check_count(table: PassageTable, report: Report) -> None:
    """Compare the number of rows with the one that was recorded when the table was finished."""
    metadata = metadata_of(table.dataset)
    if metadata.get(STATE) != COMPLETE:
        report.add("complete", f"version {table.version} is {metadata.get(STATE)}")
    elif report.rows != int(metadata[ROWS]):
        report.add(
            "complete",
            f"{report.rows} rows could be read, {metadata[ROWS]} were recorded "
            f"({metadata[NUM_ROWS]} planned before rejects and repeated ids)",
        )


def _check_corpus(
    table: PassageTable,
    report: Report,
    inputs: Sequence[str],
    storage_options: dict[str, str] | None,
    fields: FieldOptions,
    split: Splitter | None,
) -> None:
    """Compare ids, text hashes and metadata with a corpus; the first of a repeated id counts."""
    fields = replace(fields, keep=table.spec.corpus_columns)
    files = expand_inputs(inputs, storage_options, fields.format, table=address(report.uri))
    plan = plan_shards(files, shard_size=BATCH_ROWS, fields=fields, storage_options=storage_options)
    erased = erased_ids(Location(report.uri, storage_options))
    changes = compare(table.dataset, corpus_of(plan, storage_options, "first", erased, split))
    if changes.new:
        report.add("corpus", f"{changes.new} passages of the corpus are not in the table")
    if changes.changed:
        report.add("corpus", f"{changes.changed} passages have another text in the corpus")
    if changes.metadata_changed:
        count = changes.metadata_changed
        report.add("corpus", f"{count} passages have other metadata in the corpus")
    if gone := changes.missing + changes.surplus:
        report.add("corpus", f"{len(gone)} rows belong to no passage of the corpus")


def _check_sample(
    table: PassageTable, report: Report, sample: int, model: str, dtype: str | None
) -> None:
    """Encode some rows again and compare states and P(yes)."""
    spec = table.spec
    dtype = dtype or spec.compute_dtype
    decoder = QueryDecoder(model, revision=spec.revision, dtype=dtype)
    if decoder.fingerprint != spec.fingerprint:
        report.add("fingerprint", f"{model} is not the model that made this table")
        return
    encoder = PassageEncoder(model, revision=spec.revision, dtype=dtype, max_length=spec.max_length)
    computed = (spec.compute_dtype, encoder.compute_dtype)
    coarser = "bfloat16" if "bfloat16" in computed else "float32"
    rows = _some_rows(table, sample, ["id", "text"])
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


def _some_rows(table: PassageTable, count: int, columns: list[str]) -> pa.Table:
    """Return rows at random, the same ones each time, in the order of the table."""
    total = len(table)
    offsets = random.Random(count).sample(range(total), min(count, total))
    return table.dataset.take(sorted(offsets), columns=columns)
