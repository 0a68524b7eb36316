"""Finds out whether this store and this Lance can be trusted with commits, or what is wrong.

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
from typing import Any

import fsspec
import lance
import pyarrow as pa
from lance.commit import CommitConflictError
from lance.dataset import LanceOperation
from lance.schema import LanceSchema

from kalm_encoder.errors import InputError, first_line
from kalm_encoder.table.location import Location
from pipeline.corpus.access import fsspec_options
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
    (("install s3fs",), "pip install 'kalm-preencode[batch,s3]'"),
)  # fmt: skip
"""Patterns in the text of a store's error, and what the error means."""
ACCEPTED_BY_LANCE = (
    f"pylance {lance.__version__} accepts it, so shards could double: pip install 'pylance>=13'"
)
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
    yield from _check_store(table)
    yield from _check_lance(table / f"{PROBES}/{uuid.uuid4().hex}.lance")


def _explain(error: BaseException) -> str:
    """Return the first line of a store's error, with the likely cause and the remedy."""
    text = f"{type(error).__name__} {error} {error.__cause__ or ''}".lower()
    for patterns, meaning in EXPLANATIONS:
        if any(re.search(pattern, text) for pattern in patterns):
            return f"{meaning} ({first_line(error)})"
    return first_line(error)


def _check_store(table: Location) -> Iterator[Check]:
    """Write, conditionally overwrite, read and delete one object."""
    uri, name = table.uri, uuid.uuid4().hex
    local = "://" not in uri or uri.startswith("file://")
    if not local and not uri.startswith(("s3://", "s3a://")):
        return  # On other clouds, Lance's own conditional writes are all there is.
    # On a disk the object lies beside the table: then no folder is left behind, and none is removed
    # while another process uses it.
    path = f"{uri.rstrip('/')}.kalm-probe-{name}" if local else f"{uri}/{PROBES}/{name}"

    def store() -> Any:
        options = fsspec_options(uri, table.options)
        return fsspec.url_to_fs(uri, use_listings_cache=False, **options)[0]

    def write(content: bytes) -> None:
        if local:
            store().makedirs(store()._parent(path), exist_ok=True)
        store().pipe_file(path, content, mode="create")

    written = _check("fsspec: write an object", lambda: write(b"first"))
    yield written
    if written.problem:
        return
    try:
        create_again = partial(write, b"second")
        yield _check("fsspec: refuse to create it again", create_again, NO_CONDITIONAL_WRITES)
        yield _check("fsspec: read it back", lambda: _expect(store().cat_file(path), b"first"))
    finally:
        removed = _check("fsspec: delete it", lambda: store().rm_file(path))
    yield removed


def _check_lance(probe: Location) -> Iterator[Check]:
    """Make a table, try to commit what Lance must refuse, and remove the table."""
    rows = pa.table({"n": [1]})
    claim = LanceOperation.Project(
        LanceSchema.from_pyarrow(rows.schema.with_metadata({"owner": "another"}))
    )
    at: dict[str, Any] = {"storage_options": probe.options}

    def commit(operation: LanceOperation.BaseOperation, read_version: int) -> None:
        lance.LanceDataset.commit(probe.uri, operation, read_version=read_version, **at)

    def append(number: int, read_version: int) -> None:
        fragment = with_id(write_fragment(rows, probe.dataset()), number)
        commit(LanceOperation.Append([fragment]), read_version)

    def append_and_claim() -> None:
        append(1, 1)
        commit(claim, 2)

    create = partial(lance.write_dataset, rows.slice(0, 0), probe.uri, **at)
    yield _check("lance: create a table", create)
    yield _check("lance: append, and claim the table", append_and_claim)
    yield _check("lance: read it back", lambda: _expect(probe.dataset().count_rows(), 1))
    yield _check("lance: refuse a second create", create, "it replaced the first table")
    for what, action in (
        ("a fragment id twice", lambda: append(1, 3)),
        ("shards of a driver that was replaced", lambda: append(2, 2)),
        ("two drivers at once", lambda: commit(claim, 2)),
    ):
        yield _check(f"lance: refuse {what}", action, ACCEPTED_BY_LANCE, "fragment|conflict")
    yield _check("lance: remove it", partial(lance.LanceDataset.drop, probe.uri, **at))


def _check(
    name: str, action: Callable[[], Any], accepted: str | None = None, pattern: str = ""
) -> Check:
    """Check that an action succeeds, or that it is refused.

    Args:
        name: Name of the check.
        action: What is tried.
        accepted: The problem if the action succeeds. None says that it must succeed.
        pattern: What the error of a refusal must say. Any other error is a problem of its own.
    """
    try:
        action()
    except Exception as error:  # s3fs lets through botocore's errors, which share no base class
        refusal = isinstance(error, (CommitConflictError, OSError))
        if accepted and refusal and re.search(pattern, str(error)):
            return Check(name, None)
        return Check(name, _explain(error))
    return Check(name, accepted)


def _expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise InputError(f"it holds {found!r} instead of {wanted!r}")
