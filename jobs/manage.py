"""Commands that look after a table, from rejects to doctor."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from jobs.options import (
    Address,
    AsJson,
    Model,
    Revision,
    StepCpusPerWorker,
    StepWorkers,
    StorageOptions,
    Table,
    check_folder,
    executor,
    location,
    read_ids,
)
from kalm_encoder.errors import InputError


def rejects(
    uri: Table,
    as_json: AsJson = False,
    storage_option: StorageOptions = None,
) -> None:
    """List the input rows that were not encoded, with file, line and reason."""
    from pipeline.table.rejects import RejectStore

    table = location(uri, storage_option)
    table.dataset()  # an error if there is no table, which would have no rejects either
    found = RejectStore(table).read()
    for reject in found:
        if as_json:
            print(json.dumps(asdict(reject), ensure_ascii=False))
        else:
            named = f" id {reject.id!r}" if reject.id is not None else ""
            print(f"{reject.path} line {reject.line}{named}: {reject.reason}")
    if not as_json:
        print(f"{len(found):,} rows rejected")


def delete(
    uri: Table,
    ids_file: Annotated[Path, typer.Option(help="Text file with one id per line.")],
    storage_option: StorageOptions = None,
) -> None:
    """Delete passages by id; readers switch when all are gone."""
    from pipeline.upkeep.delete import delete as delete_rows

    ids = read_ids(ids_file)
    if not ids:
        raise InputError(f"{ids_file} holds no id")
    print(f"deleted {delete_rows(location(uri, storage_option), ids):,} passages")


def erase(
    uri: Table,
    ids_file: Annotated[Path | None, typer.Option(help="Text file with one id per line.")] = None,
    where: Annotated[
        str | None,
        typer.Option(help="SQL predicate over the columns, such as \"tenant = 'acme'\"."),
    ] = None,
    wait: Annotated[
        float,
        typer.Option(
            help="Seconds between the switch of the readers and the removal of what they read "
            "before. Raise it if services look for new versions less often."
        ),
    ] = 30.0,
    certificate: Annotated[
        Path | None, typer.Option(help="File for a copy of the certificate, as JSON.")
    ] = None,
    disk_cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a disk cache on this machine to empty too. Give it if nothing runs "
            "that would drop the erased passages from there."
        ),
    ] = None,
    storage_option: StorageOptions = None,
) -> None:
    """Erase passages for good: no data file, index or older version holds them afterwards."""
    from kalm_encoder.table.cache.folder import CacheFolder
    from pipeline.upkeep.erase import erase as erase_rows

    ids = [] if ids_file is None else read_ids(ids_file)
    if not ids and where is None:
        raise InputError(f"{ids_file} holds no id" if ids_file else "give --ids-file or --where")
    check_folder(certificate)
    cache = None if disk_cache is None else CacheFolder.existing(disk_cache)
    done = erase_rows(location(uri, storage_option), ids, where=where, wait_s=wait)
    if certificate is not None:
        certificate.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    print(
        f"erased {done['rows_deleted']:,} passages and removed {len(done['objects_removed']):,} "
        f"objects; version {done['version']} is the only one left"
    )
    for check in done["checks"]:
        print(f"checked: {check}")
    if cache is not None:
        print(f"removed all {cache.purge():,} segments of the disk cache {disk_cache}")


def publish(
    uri: Table,
    version: Annotated[
        int | None,
        typer.Option(
            help="Version number, to go back further than `kalm rollback`. Default: the latest."
        ),
    ] = None,
    storage_option: StorageOptions = None,
) -> None:
    """Let readers see a complete version: move the tag `live` to it."""
    from pipeline.table.publish import publish as move

    print(f"version {move(location(uri, storage_option), version)} is live")


def rollback(uri: Table, storage_option: StorageOptions = None) -> None:
    """Let readers see the version that was live before; run it again to undo."""
    from pipeline.table.publish import rollback as move

    print(f"version {move(location(uri, storage_option))} is live again")


def compact(
    context: typer.Context,
    uri: Table,
    workers: StepWorkers = None,
    cpus_per_worker: StepCpusPerWorker = None,
    address: Address = None,
    storage_option: StorageOptions = None,
) -> None:
    """Merge small data files and bring the indexes up to date."""
    execute = executor(context, workers, cpus_per_worker, address, is_step=True)
    from pipeline.upkeep.delete import compact as merge

    merge(location(uri, storage_option), execute)
    print(f"{uri} is compact")


def adopt(
    uri: Table,
    model: Model,
    revision: Revision = None,
    sample: Annotated[
        int,
        typer.Option(
            help="Rows to encode again and compare. Raise it where an edit may concern few texts, "
            "such as one of the tokenizer."
        ),
    ] = 100,
    storage_option: StorageOptions = None,
) -> None:
    """Let a table belong to an edited model with the same weights and the same results."""
    from pipeline.upkeep.adopt import adopt as take_over

    report = take_over(location(uri, storage_option), model, revision=revision, sample=sample)
    if report is None:
        print(f"{uri} belongs to {model} already")
        return
    print(
        f"{uri} belongs to {model} now: the weights are the same, and of {sample} rows the states "
        f"differ by at most {report.largest_state_error:.2g} (relative), P(yes) by "
        f"{report.largest_score_error:.2g}"
    )


def push(
    uri: Table,
    to: Annotated[
        str,
        typer.Argument(help="Where to: hf://datasets/OWNER/NAME/TABLE.lance."),
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a private dataset, if it has to be made.")
    ] = False,
    storage_option: StorageOptions = None,
) -> None:
    """Verify the live version and upload it to the Hugging Face hub, with a card."""
    from pipeline.upkeep.push import push as upload

    print(f"uploaded as {upload(location(uri, storage_option), to, private=private)}")


def gc(
    uri: Table,
    older_than: Annotated[
        float,
        typer.Option(
            help="Days that a version or file must be old. Lower it to free space sooner; a reader "
            "that holds an older version open then fails."
        ),
    ] = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    storage_option: StorageOptions = None,
) -> None:
    """Remove old versions that no tag names, and files of crashed attempts."""
    from pipeline.upkeep.garbage import collect_garbage

    table, age = location(uri, storage_option), timedelta(days=older_than)
    found = collect_garbage(table, older_than=age, dry_run=dry_run)
    print(
        f"{'would remove' if dry_run else 'removed'} {found.versions} versions, "
        f"{found.files} data files, {found.bytes:,} bytes"
    )


def doctor(
    uri: Annotated[str, typer.Argument(help="Path or URL of a table, or where one is to be.")],
    storage_option: StorageOptions = None,
) -> None:
    """Try everything a job does on this store and explain what is wrong.

    The exit code is 1 if anything is wrong.
    """
    from pipeline.table.preflight import examine

    checks = list(examine(location(uri, storage_option)))
    for check in checks:
        print(f"{'FAILED' if check.problem else 'ok':<7}{check.name}")
        if check.problem:
            print(f"       {check.problem}")
    if any(check.problem for check in checks):
        raise typer.Exit(1)
