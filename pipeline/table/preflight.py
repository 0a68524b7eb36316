"""Finds out whether a table can be made in a place, and whether its store and Lance keep promises.

The commit protocol stands on refusals. The store must refuse to create an object that exists: one
that does not loses commits without a word. Lance must refuse a fragment id that exists, and
whatever was prepared before another driver claimed the table. pylance is pinned and a test tries
that; `kalm doctor` tries it too.

Nothing that a job does may fail for the first time when everything is encoded. So each job does all
of it once before, with a probe table: even the tag that makes a table live.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import lance
import pyarrow as pa
from lance.commit import CommitConflictError
from lance.dataset import LanceOperation
from lance.schema import LanceSchema

from kalm_encoder.errors import InputError, first_line
from kalm_encoder.table.location import Location
from kalm_encoder.table.reader import LIVE_TAG
from pipeline.corpus.clouds import fsspec_options
from pipeline.table.fragments import with_id, write_fragment
from pipeline.table.publish import set_tag, tagged_version
from pipeline.table.side_files import PROBES, RUN_VIEW, read_text, write_text

CORPUS_LIBRARIES = {
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
}
"""The library by which a corpus on a cloud is read, by scheme."""
EXPLANATIONS = (
    ((r"errno 1?3\b", r"os error 1?3\b", "permission denied", "operation not permitted"),
     "this user may not write there: check the owner and the mode of the folder, or choose another "
     "place"),
    (("read-only file system",), "the disk is mounted read-only: choose another place"),
    (("no space left", "quota exceeded"), "the disk is full: free space, or choose another place"),
    (("not a directory", "file exists"),
     "a file lies where a folder must be: move it, or choose another place"),
    (("file name too long",), "a name in the address is too long for the disk: shorten it"),
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
    (("install gcsfs",), "pip install 'kalm-preencode[batch,gcs]'"),
    (("install adlfs",), "pip install 'kalm-preencode[batch,azure]'"),
)  # fmt: skip
"""Patterns in the text of a store's error, and what the error means."""
ACCEPTED_BY_LANCE = (
    f"pylance {lance.__version__} accepts it, so shards could double: pip install 'pylance>=13'"
)
NO_CONDITIONAL_WRITES = (
    "the store overwrites it: it has no conditional writes (If-None-Match), so two writers would "
    "lose each other's commits. Use a store that has them"
)
WRITE, CREATE = "fsspec: write an object", "lance: create a table"
"""The checks without which nothing else can succeed."""


@dataclass(frozen=True)
class Check:
    """One thing that was tried; `problem` is None if it went well."""

    name: str
    problem: str | None


def check_writable(table: Location) -> None:
    """Refuse a place where a job would fail after its encoding, or could lose commits.

    Raises:
        InputError: If a check fails; the message says which, and the remedy.
    """
    for check in _examine(table, _use_lance):
        if check.problem:
            raise InputError(f"cannot write safely to {table}: {check.name}: {check.problem}")


def examine(table: Location) -> Iterator[Check]:
    """Try everything that a job does on the store of a table, and what Lance must refuse."""
    yield from _examine(table, _use_lance, _check_refusals, _read_files)


def _examine(table: Location, *parts: Callable[[Location], Iterator[Check]]) -> Iterator[Check]:
    """Check the store, and Lance on a probe table, and clean up.

    On a disk the probe lies in the table's folder, since nothing beside it need be writable, or in
    the nearest folder above it that is there. The table's own folder is not made.
    """
    place = table / PROBES
    if table.is_local and not os.path.exists(table.uri):
        parents = Path(table.uri).parents
        place = replace(table, uri=str(next(filter(os.path.exists, parents))))
    folder = place / f".kalm-probe-{uuid.uuid4().hex}"
    # The name is the table's own: a store may take some characters amiss.
    probe = folder / table.uri.rstrip("/").rpartition("/")[2]
    try:
        for check in chain(_check_store(folder / "object"), *(part(probe) for part in parts)):
            yield check
            if check.problem and check.name in (WRITE, CREATE):
                return  # Each further try may wait for a store that does not answer.
        drop = partial(lance.LanceDataset.drop, probe.uri, storage_options=probe.options)
        yield _check("lance: remove it", drop)
    finally:
        if table.is_local:  # A check has said what could not be removed.
            shutil.rmtree(folder.uri, ignore_errors=True)


def _explain(error: BaseException) -> str:
    """Return the first line of a store's error, with the likely cause and the remedy."""
    text = f"{type(error).__name__} {error} {error.__cause__ or ''}".lower()
    for patterns, meaning in EXPLANATIONS:
        if any(re.search(pattern, text) for pattern in patterns):
            return f"{meaning} ({first_line(error)})"
    return first_line(error)


def _check_store(probe: Location) -> Iterator[Check]:
    """Write, conditionally overwrite, read and delete one object."""
    if not probe.is_local and not probe.uri.startswith(("s3://", "s3a://")):
        return  # On other clouds, Lance's own conditional writes are all that a job stands on.
    path = probe.uri if probe.is_local else unquote(probe.uri)  # s3fs takes a key, Lance a URL

    def store() -> Any:
        options = fsspec_options(probe.uri, probe.options)
        return fsspec.url_to_fs(path, use_listings_cache=False, **options)[0]

    def write(content: bytes) -> None:
        if probe.is_local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        store().pipe_file(path, content, mode="create")

    yield _check(WRITE, partial(write, b"first"))
    create_again = partial(write, b"second")
    yield _check("fsspec: refuse to create it again", create_again, NO_CONDITIONAL_WRITES)
    yield _check("fsspec: read it back", lambda: _expect(store().cat_file(path), b"first"))
    yield _check("fsspec: delete it", lambda: store().rm_file(path))


def _read_files(probe: Location) -> Iterator[Check]:
    """Read a file as those of a corpus are read, on a cloud whose library may not be here."""
    library = CORPUS_LIBRARIES.get(probe.uri.partition("://")[0])
    if library is None:
        return
    if find_spec(library) is None:
        yield Check(
            f"fsspec: not tried, {library} is not installed (a corpus there needs it)", None
        )
        return
    file = probe / "corpus.txt"
    options = fsspec_options(file.uri, file.options)

    def read() -> None:
        session = probe.file_session()
        write_text(session, "corpus.txt", "first")
        store, path = fsspec.url_to_fs(file.uri, use_listings_cache=False, **options)
        _expect(store.cat_file(path), b"first")
        _expect([entry.rpartition("/")[2] for entry in store.find(path)], ["corpus.txt"])
        session.delete_file("corpus.txt")

    yield _check("fsspec: read a file, and find it", read)


def _use_lance(probe: Location) -> Iterator[Check]:
    """Make a table, and do with it what a job does."""
    rows = pa.table({"id": ["a"]})

    def append_and_claim() -> None:
        _append(probe, rows, 1, read_version=1)
        _claim(probe, rows, read_version=2)

    def keep_a_file() -> None:
        session = probe.file_session()
        for text in ("first", "second"):
            write_text(session, RUN_VIEW, text)
        _expect(read_text(session, RUN_VIEW), "second")
        for path in session.list(posixpath.dirname(RUN_VIEW)):
            session.delete_file(path)
        _expect(session.contains(RUN_VIEW), False)

    def move_a_tag() -> None:
        for version in (1, 2):
            set_tag(probe, LIVE_TAG, version)
            _expect(tagged_version(probe.dataset(), LIVE_TAG), version)
        probe.tags().delete(LIVE_TAG)
        _expect(tagged_version(probe.dataset(), LIVE_TAG), None)

    yield _check(CREATE, partial(_create, probe, rows))
    yield _check("lance: append, and claim the table", append_and_claim)
    yield _check("lance: read it back", lambda: _expect(probe.dataset().count_rows(), 1))
    yield _check("lance: index it", lambda: probe.dataset().create_scalar_index("id", "BTREE"))
    yield _check("lance: keep a file beside it, replace and delete the file", keep_a_file)
    yield _check("lance: set, move and delete a tag", move_a_tag)


def _check_refusals(probe: Location) -> Iterator[Check]:
    """Try to commit to the table of `_use_lance` what Lance must refuse."""
    rows = pa.table({"id": ["a"]})
    create = partial(_create, probe, rows)
    yield _check("lance: refuse a second create", create, "it replaced the first table")
    for what, action in (
        ("a fragment id twice", partial(_append, probe, rows, 1, read_version=3)),
        ("shards of a driver that was replaced", partial(_append, probe, rows, 2, read_version=2)),
        ("two drivers at once", partial(_claim, probe, rows, read_version=2)),
    ):
        yield _check(f"lance: refuse {what}", action, ACCEPTED_BY_LANCE, "fragment|conflict")


def _create(probe: Location, rows: pa.Table) -> None:
    lance.write_dataset(rows.slice(0, 0), probe.uri, storage_options=probe.options)


def _append(probe: Location, rows: pa.Table, number: int, *, read_version: int) -> None:
    fragment = with_id(write_fragment(rows, probe.dataset()), number)
    _commit(probe, LanceOperation.Append([fragment]), read_version)


def _claim(probe: Location, rows: pa.Table, *, read_version: int) -> None:
    schema = LanceSchema.from_pyarrow(rows.schema.with_metadata({"owner": "another"}))
    _commit(probe, LanceOperation.Project(schema), read_version)


def _commit(probe: Location, operation: LanceOperation.BaseOperation, read_version: int) -> None:
    options = probe.options
    lance.LanceDataset.commit(
        probe.uri, operation, read_version=read_version, storage_options=options
    )


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
