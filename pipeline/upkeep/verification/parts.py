"""Has all rows of a table checked part by part, and merges what the parts report."""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import replace
from typing import Any

import xxhash

from kalm_encoder.errors import InputError, first_line
from kalm_encoder.table.location import Location
from kalm_encoder.table.reader import PassageTable
from pipeline.messages import Executor, Part
from pipeline.table.partitions import PARTITION_ROWS, num_partitions
from pipeline.table.side_files import STEPS, STORE_ERRORS, is_data, read_text, write_text
from pipeline.table.steps import Steps
from pipeline.upkeep.row_ranges import TableRows
from pipeline.upkeep.verification.report import (
    SHOWN,
    Problem,
    Report,
    engine_errors_are_problems,
)
from pipeline.upkeep.verification.rows import CheckRows, FindRepeated
from pipeline.workers.local import in_process

logger = logging.getLogger(__name__)

PART_BYTES = 256 << 20
"""Bytes of a part, about. A command that is killed repeats only the parts that were under way."""
MOST_PARTS = 4096
"""Beyond so many parts of PART_BYTES, parts are larger: each leaves two small files."""
REPEATED = "repeated"
"""Folder, below that of a verification, of the results of comparing ids."""


def check_rows(
    table: PassageTable,
    location: Location,
    report: Report,
    execute: Executor,
    scratch: Location | None = None,
    part_bytes: int = PART_BYTES,
) -> None:
    """Check all rows and find repeated ids.

    Args:
        table: The table.
        location: Where it lies.
        report: Gets the number of rows and the problems, in the order of the rows.
        execute: Does the parts.
        scratch: Folder for what the workers exchange and for the results of the parts, which a
            later call with the same arguments finds. None takes one in the table's own.
        part_bytes: Bytes of a part, about.

    Raises:
        InputError: If `scratch` cannot be written.
        IncompleteError: If some parts failed for good.
    """
    rows = TableRows(table.dataset)
    ranges = rows.cut(max(part_bytes, rows.num_bytes() / MOST_PARTS), PARTITION_ROWS)
    parts = [Part(number, what, what[1]) for number, what in enumerate(ranges)]
    partitions = num_partitions(len(rows))
    base = scratch or location / STEPS
    work = CheckRows(table=location, version=table.version, partitions=partitions)
    steps = Steps(execute)
    with tempfile.TemporaryDirectory(prefix="kalm-verify-") as temporary:
        folder = base / f"verify-{_key(table, ranges)}"
        is_shared = len(parts) > 1 and _is_writable(folder, must_be=scratch is not None)
        if is_shared:
            _forget_problems(folder)
            found = steps.results("checking rows", replace(work, hashed=folder), parts, folder)
        elif len(parts) > 1:
            found = steps.results("checking rows", work, parts)
            # Other machines do not see the temporary folder, so that this process hashes the ids.
            steps, folder = Steps(in_process), Location(temporary)
            hashing = replace(work, hashed=folder, checks=False)
            hashed = steps.results("reading ids", hashing, parts)
            found = [
                {**one, "file": other["file"]} for one, other in zip(found, hashed, strict=True)
            ]
        else:  # one part is done in this process, wherever others are
            folder = Location(temporary)
            found = steps.results("checking rows", replace(work, hashed=folder), parts)
        _merge(report, found)
        files = tuple(folder / result["file"] for result in found)
        finding = FindRepeated(table=location, files=files)
        numbers = [Part(number, number) for number in range(partitions)]
        joined = folder / REPEATED if is_shared else None
        repeated = steps.results("finding repeated ids", finding, numbers, joined)
        _add_repeated(report, table, repeated)
        if is_shared:
            _remove(folder)


def _merge(report: Report, found: list[dict[str, Any]]) -> None:
    for result in found:
        report.rows += result["rows"]
        report.num_problems += result["num_problems"]
        room = SHOWN - len(report.problems)
        report.problems += [Problem(**problem) for problem in result["problems"][:room]]


def _add_repeated(report: Report, table: PassageTable, found: list[dict[str, Any]]) -> None:
    """Report each row whose id an earlier row has; the first of them by name."""
    rows = sorted(row for result in found for row in result["rows"])[:SHOWN]
    count = sum(result["count"] for result in found)
    if not rows:
        return
    before = report.num_problems
    with engine_errors_are_problems(report, "unique ids", "ids cannot be read"):
        for id in table.dataset.take(rows, columns=["id"])["id"].to_pylist():
            report.add("unique ids", "the id is there more than once", id)
    report.num_problems = max(report.num_problems, before + count)


def _key(table: PassageTable, ranges: list[tuple[int, int]]) -> str:
    """Return a name for the rows of a version and the way in which they are cut."""
    files = [[file.path for file in f.metadata.files] for f in table.dataset.get_fragments()]
    told = json.dumps([table.uri, table.version, files, ranges])
    return f"{table.version}-{xxhash.xxh3_64_hexdigest(told.encode())}"


def _is_writable(folder: Location, *, must_be: bool) -> bool:
    try:
        write_text(folder.file_session(), "began", "")
    except STORE_ERRORS as error:
        if must_be:
            raise InputError(f"cannot write to --scratch {folder}: {first_line(error)}") from error
        logger.warning(
            "%s cannot be written (%s): a verification that is killed begins anew, and this "
            "process reads all ids. --scratch URL gives it and its workers another folder",
            folder, first_line(error),
        )  # fmt: skip
        return False
    return True


def _forget_problems(folder: Location) -> None:
    """Let parts with problems be checked again: what was wrong may have been mended since."""
    session = folder.file_session()
    for path in session.list():
        is_result = path.endswith(".json") and "/" not in path
        if is_result and json.loads(read_text(session, path))["num_problems"]:
            session.delete_file(path)
            for joined in session.list(REPEATED):  # found without the ids that are read now
                session.delete_file(joined)


def _remove(folder: Location) -> None:
    """Remove what the workers exchanged, the results first: they name the other files."""
    session = folder.file_session()
    try:
        for path in sorted(session.list(), key=is_data):
            session.delete_file(path)
    except STORE_ERRORS as error:
        logger.warning("%s cannot be removed: %s", folder, first_line(error))
