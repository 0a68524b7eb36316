"""Whether this Lance and this store can be trusted with commits; and what is wrong if not.

The commit protocol stands on refusals: Lance must refuse a fragment id that is there already and
whatever is older than the commit by which a driver took the table over, and the store must refuse
to create an object that is there already. A store that ignores the last loses commits without a
word, so it is refused before anything is written.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
     "the store refuses the credentials, or they may not do this: check key, secret, session "
     "token (expired?) and the bucket's policy"),
    (("nosuchbucket", "bucket does not exist"), "the bucket does not exist: create it first"),
    (("connection refused", "could not connect", "endpointconnection", "dns error", "timed out",
      "name or service"),
     "nothing answers there: check aws_endpoint, and aws_allow_http=true for an http:// address"),
    (("no space left", "quota"), "the disk is full"),
    (("permission denied", "read-only file system"), "this user may not write there"),
    (("not a directory", "file exists"), "something that is no folder stands in the way"),
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One thing `kalm doctor` tried; `problem` is None where it went well."""

    name: str
    problem: str | None


def check_writable(location: Location) -> None:
    """Refuse a Lance or a store on which commits could be lost or doubled.

    Raises:
        InputError: says which, and the remedy.
    """
    for check in (*_what_lance_refuses(), *_through_fsspec(location)):
        if check.problem:
            raise InputError(f"cannot write safely to {location}: {check.name}: {check.problem}")


def examine(location: Location) -> Iterator[Check]:
    """Try everything a job does on the store of a location, beside the table, and clean up."""
    yield from _what_lance_refuses()
    yield from _through_fsspec(location)
    probe = (location / f"{PROBES}/{uuid.uuid4().hex}.lance").uri
    rows = pa.table({"n": [1, 2, 3]})
    at = {"storage_options": location.options}
    yield _check("lance: create a table", lambda: lance.write_dataset(rows, probe, **at))
    yield _check("lance: append", lambda: lance.write_dataset(rows, probe, mode="append", **at))
    yield _check("lance: read it back", lambda: _expect_rows(lance.dataset(probe, **at), 6))
    yield _check("lance: refuse a second create", lambda: _expect_refusal(rows, probe, at))
    yield _check("lance: remove it", lambda: lance.LanceDataset.drop(probe, **at))


def explain(error: BaseException) -> str:
    """Return the first line of a store's error with the likely cause and remedy."""
    text = f"{type(error).__name__} {error} {error.__cause__ or ''}".lower()
    for words, meaning in EXPLANATIONS:
        if any(re.search(word, text) for word in words):
            return f"{meaning} ({first_line(error)})"
    return first_line(error)


def _what_lance_refuses() -> Iterator[Check]:
    """Commit what must be refused, to a table in memory of this Lance's own."""
    rows = pa.table({"n": [1]})
    empty = lance.write_dataset(rows.slice(0, 0), f"memory://{uuid.uuid4().hex}")
    schema = LanceSchema.from_pyarrow(rows.schema.with_metadata({"owner": "another"}))
    hand_over = LanceOperation.Project(schema)

    def append(number: int, dataset: lance.LanceDataset) -> lance.LanceDataset:
        fragment = with_id(write_fragment(rows, dataset), number)
        return _commit(LanceOperation.Append([fragment]), dataset)

    first = append(1, empty)
    yield _refused("a fragment id twice", lambda: append(1, first))
    _commit(hand_over, first)
    yield _refused("shards of a driver that was replaced", lambda: append(2, first))
    yield _refused("two drivers at once", lambda: _commit(hand_over, first))


def _commit(operation: LanceOperation.BaseOperation, read: lance.LanceDataset) -> Any:
    return lance.LanceDataset.commit(read, operation, read_version=read.version)


def _refused(what: str, commit: Callable[[], Any]) -> Check:
    name = f"lance: refuse {what}"
    try:
        commit()
    except (CommitConflictError, OSError) as error:
        if re.search("fragment|conflict", str(error)):
            return Check(name, None)
        return Check(name, first_line(error))
    return Check(
        name,
        f"pylance {lance.__version__} accepts it and shards could be doubled: "
        "pip install 'pylance>=13'",
    )


def _through_fsspec(location: Location) -> Iterator[Check]:
    """Write, conditionally overwrite, read and delete one object."""
    uri = location.uri
    local = "://" not in uri or uri.startswith("file://")
    if not local and not uri.startswith(("s3://", "s3a://")):
        return  # other clouds: Lance's own conditional writes are all there is
    try:
        options = fsspec_options(uri, location.options)
        fs, root = fsspec.core.url_to_fs(uri, use_listings_cache=False, **options)
    except ImportError as error:
        problem = f"{error}: pip install 'kalm-preencode[batch,s3]'"
        yield Check("fsspec: open the store", problem)
        return
    name = uuid.uuid4().hex
    # On a disk beside the table: no folder is left behind, none is removed under another's feet.
    path = str(Path(root).parent / f".kalm-probe-{name}") if local else f"{root}/{PROBES}/{name}"

    def write() -> None:
        if local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        fs.pipe_file(path, b"first", mode="create")

    written = _check("fsspec: write an object", write)
    yield written
    if written.problem:
        return
    try:
        yield _check("fsspec: refuse to create it again", lambda: _expect_exclusive(fs, path))
        yield _check("fsspec: read it back", lambda: _expect_bytes(fs.cat_file(path)))
    finally:
        removed = _check("fsspec: delete it", lambda: fs.rm_file(path))
    yield removed


def _check(name: str, action: Callable[[], Any]) -> Check:
    try:
        action()
    except Exception as error:  # s3fs lets botocore's errors through, which share no base
        return Check(name, explain(error))
    return Check(name, None)


def _expect_exclusive(fs: Any, path: str) -> None:
    try:
        fs.pipe_file(path, b"second", mode="create")
    except OSError:
        return
    raise InputError(
        "the store overwrites it: it has no conditional writes (If-None-Match), so two writers "
        "would lose each other's commits. Use a store that has them"
    )


def _expect_bytes(found: bytes) -> None:
    if found != b"first":
        raise InputError(f"it holds {found!r} instead of b'first'")


def _expect_rows(dataset: lance.LanceDataset, rows: int) -> None:
    if dataset.count_rows() != rows:
        raise InputError(f"{dataset.count_rows()} rows instead of {rows}")


def _expect_refusal(rows: pa.Table, probe: str, at: dict[str, Any]) -> None:
    try:
        lance.write_dataset(rows, probe, mode="create", **at)
    except OSError:
        return
    raise InputError("a second table was created over the first")
