"""Checks every row of a table: what `kalm verify` does. It reports all problems and raises none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kalm_encoder.errors import InputError
from kalm_encoder.table import hub
from kalm_encoder.table.location import Location, address
from kalm_encoder.table.reader import PassageTable
from pipeline.corpus.inputs import expand_inputs
from pipeline.corpus.passages import FieldOptions
from pipeline.corpus.shards import plan_shards
from pipeline.messages import Executor
from pipeline.run.planning import ScanOnWorkers
from pipeline.table.claim import COMPLETE, STATE, metadata_of
from pipeline.table.erasures import erased_ids
from pipeline.table.finish import ROWS
from pipeline.table.ledger import NUM_ROWS
from pipeline.table.steps import Steps
from pipeline.upkeep.comparison.compare import compared
from pipeline.upkeep.comparison.corpus import Corpus, Reading
from pipeline.upkeep.row_ranges import BATCH_ROWS
from pipeline.upkeep.verification.parts import PART_BYTES, check_rows
from pipeline.upkeep.verification.report import SHOWN, Report, engine_errors_are_problems
from pipeline.upkeep.verification.sample import check_sample, some_rows
from pipeline.workers.local import in_process


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
    execute: Executor = in_process,
    scratch: str | None = None,
    part_bytes: int = PART_BYTES,
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
        execute: Checks the rows, and compares with a corpus: in this process or on Ray workers.
        scratch: Address of a folder that the workers can write, if they cannot write the table's.
        part_bytes: Bytes of the rows that a worker checks at a time, about.

    Raises:
        TableError: If there is no such table or version.
        InputError: If a sample was asked for and the table stores no text, an input is bad, or
            `scratch` cannot be written.
        IncompleteError: If workers could not check some parts; the same call goes on.
    """
    if hub.is_on_hub(uri):
        uri, _ = hub.download(uri)
    table = PassageTable.open(uri, version=version, storage_options=storage_options)
    if sample and not table.spec.keep_text:
        raise InputError(
            f"{uri} stores no text, so no row can be encoded again: leave out --sample"
        )
    report = Report(uri, table.version)
    folder = Location(scratch, storage_options) if scratch else None
    location = Location(uri, storage_options)
    check_rows(table, location, report, execute, folder, part_bytes)
    _check_count(table, report)
    # Queries look rows up through the id index, which the checks above do not read.
    with engine_errors_are_problems(report, "look-up", "rows cannot be looked up by id"):
        table.take(some_rows(table, SHOWN, ["id"])["id"].to_pylist())
    if inputs:
        fields, model_of_corpus = fields or FieldOptions(), model or table.spec.model
        _check_corpus(table, report, inputs, location, fields, model_of_corpus, execute, folder)
    if sample:
        check_sample(table, report, sample, model or table.spec.model, dtype)
    return report


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
    location: Location,
    fields: FieldOptions,
    model: str,
    execute: Executor,
    folder: Location | None,
) -> None:
    """Compare ids, text hashes and metadata with a corpus; the first of a repeated id counts."""
    fields, storage_options = replace(fields, keep=table.spec.corpus_columns), location.options
    files = expand_inputs(inputs, storage_options, fields.format, table=address(report.uri))
    plan = plan_shards(
        files, shard_size=BATCH_ROWS, fields=fields, storage_options=storage_options,
        scan_files=ScanOnWorkers(location, execute),
    )  # fmt: skip
    erased = erased_ids(location)
    reading = Reading(table.spec, model, table.spec.revision, erased, storage_options)
    corpus = Corpus(reading, plan.shards)
    with compared(Steps(execute), location, table.dataset, corpus, "first", folder) as changes:
        found = changes.counts()
    for name, words in (
        ("new", "passages of the corpus are not in the table"),
        ("changed", "passages have another text in the corpus"),
        ("metadata_changed", "passages have other metadata in the corpus"),
    ):
        if found[name]:
            report.add("corpus", f"{found[name]} {words}")
    if gone := found["missing"] + found["surplus"]:
        report.add("corpus", f"{gone} rows belong to no passage of the corpus")
