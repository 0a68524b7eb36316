"""Whether this store and this Lance can be trusted with commits, and what is wrong if not.

The commit protocol stands on refusals. The store must refuse to create an object that exists: one
that does not loses commits without a word, so every job tries it before anything is written. Lance
must refuse a fragment id that exists, and whatever was prepared before another driver claimed the
table. pylance is pinned and a test tries that; `kalm doctor` tries both.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import lance
import pyarrow as pa
from lance.commit import CommitConflictError
from lance.dataset import LanceOperation
from lance.schema import LanceSchema

from kalm_encoder.errors import InputError, first_line
from kalm_encoder.table.location import Location
from pipeline.corpus.inputs import fsspec_options
from pipeline.table.fragments import with_id, write_fragment
from pipeline.table.side_files import PROBES

EXPLANATIONS = (
    (("invalidaccesskeyid", "signaturedoesnotmatch", r"\b403\b", "forbidden", "accessdenied",
      "access denied", "expiredtoken", "nocredentials", "unable to locate credentials",
      "invalidtoken", "permissionerror"),
     "the store refuses the credentials, or they do not allow this: check the key, the secret, the "
     "session token (has it expired?) and the bucket's policy"),
    (("nosuchbucket", "bucket does not exist"), "the bucket does not exist: create it first"),
    (("connection refused", "could not connect", "endpointconnection", "dns error", "timed out",
      "name or service"),
     "nothing answers there: check aws_endpoint, and set aws_allow_http=true for an http:// "
     "address"),
    (("no space left", "quota"), "the disk is full"),
    (("permission denied", "read-only file system"), "this user may not write there"),
    (("not a directory", "file exists"), "something that is no folder stands in the way"),
)  # fmt: skip
"""Patterns in the text of a store's error, and what the error means."""
NO_CONDITIONAL_WRITES = (
    "the store overwrites it: it has no conditional writes (If-None-Match), so two writers would "
    "lose each other's commits. Use a store that has them"
)


@dataclass(frozen=True)
class Check:
    """One thing that was tried; `problem` is None if it went well."""

    name: str
    problem: str | None


def check_writable(table: Location) -> None:
    """Refuse a store on which commits could be lost or doubled.

    Raises:
        InputError: If the store fails; the message says in what, and the remedy.
    """
    for check in _check_store(table):
        if check.problem:
            raise InputError(f"cannot write safely to {table}: {check.name}: {check.problem}")


def examine(table: Location) -> Iterator[Check]:
    """Try everything that a job does on the store of a table, beside the table, and clean up."""
    yield from _check_lance()
    yield from _check_store(table)
    probe = table / f"{PROBES}/{uuid.uuid4().hex}.lance"
    at = {"storage_options": probe.options}
    create = partial(lance.write_dataset, pa.table({"n": [1, 2, 3]}), probe.uri, **at)
    yield _check("lance: create a table", create)
    yield _check("lance: append", partial(create, mode="append"))
    yield _check("lance: read it back", lambda: _expect(probe.dataset().count_rows(), 6))
    overwrites = "a second table was created over the first"
    yield _refused("lance: refuse a second create", create, overwrites)
    yield _check("lance: remove it", partial(lance.LanceDataset.drop, probe.uri, **at))


def explain(error: BaseException) -> str:
    """Return the first line of a store's error, with the likely cause and the remedy."""
    text = f"{type(error).__name__} {error} {error.__cause__ or ''}".lower()
    for patterns, meaning in EXPLANATIONS:
        if any(re.search(pattern, text) for pattern in patterns):
            return f"{meaning} ({first_line(error)})"
    return first_line(error)


def _check_lance() -> Iterator[Check]:
    """Try to commit what Lance must refuse, to a table in memory."""
    rows = pa.table({"n": [1]})
    schema = LanceSchema.from_pyarrow(rows.schema.with_metadata({"owner": "another"}))
    claim = LanceOperation.Project(schema)

    def commit(read: lance.LanceDataset, operation: LanceOperation.BaseOperation) -> Any:
        return lance.LanceDataset.commit(read, operation, read_version=read.version)

    def append(read: lance.LanceDataset, number: int) -> Any:
        return commit(read, LanceOperation.Append([with_id(write_fragment(rows, read), number)]))

    first = append(lance.write_dataset(rows.slice(0, 0), f"memory://{uuid.uuid4().hex}"), 1)
    claimed = commit(first, claim)
    for what, action in (
        ("a fragment id twice", lambda: append(claimed, 1)),
        ("shards of a driver that was replaced", lambda: append(first, 2)),
        ("two drivers at once", lambda: commit(first, claim)),
    ):
        accepted = f"pylance {lance.__version__} accepts it and shards could be doubled"
        remedy = "pip install 'pylance>=13'"
        yield _refused(
            f"lance: refuse {what}", action, f"{accepted}: {remedy}", "fragment|conflict"
        )


def _check_store(table: Location) -> Iterator[Check]:
    """Write, conditionally overwrite, read and delete one object."""
    uri = table.uri
    local = "://" not in uri or uri.startswith("file://")
    if not local and not uri.startswith(("s3://", "s3a://")):
        return  # On other clouds, Lance's own conditional writes are all there is.
    try:
        options = fsspec_options(uri, table.options)
        fs, root = fsspec.core.url_to_fs(uri, use_listings_cache=False, **options)
    except ImportError as error:
        problem = f"{error}: pip install 'kalm-preencode[batch,s3]'"
        yield Check("fsspec: open the store", problem)
        return
    name = uuid.uuid4().hex
    # On a disk the object lies beside the table: then no folder is left behind, and none is removed
    # while another process uses it.
    path = str(Path(root).parent / f".kalm-probe-{name}") if local else f"{root}/{PROBES}/{name}"

    def write(content: bytes) -> None:
        if local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        fs.pipe_file(path, content, mode="create")

    written = _check("fsspec: write an object", lambda: write(b"first"))
    yield written
    if written.problem:
        return
    try:
        again = "fsspec: refuse to create it again"
        yield _refused(again, lambda: write(b"second"), NO_CONDITIONAL_WRITES)
        yield _check("fsspec: read it back", lambda: _expect(fs.cat_file(path), b"first"))
    finally:
        removed = _check("fsspec: delete it", lambda: fs.rm_file(path))
    yield removed


def _check(name: str, action: Callable[[], Any]) -> Check:
    try:
        action()
    except Exception as error:  # s3fs lets through botocore's errors, which share no base class
        return Check(name, explain(error))
    return Check(name, None)


def _expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise InputError(f"it holds {found!r} instead of {wanted!r}")


def _refused(name: str, action: Callable[[], Any], accepted: str, pattern: str = "") -> Check:
    """Check that an action fails.

    Args:
        name: Name of the check.
        action: What the store or Lance must refuse.
        accepted: The problem if it does not.
        pattern: What the error must say. Any other error is a problem of its own.
    """

    def attempt() -> None:
        try:
            action()
        except (CommitConflictError, OSError) as error:
            if not re.search(pattern, str(error)):
                raise
        else:
            raise InputError(accepted)

    return _check(name, attempt)
