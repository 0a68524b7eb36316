"""A copy of the plan beside its table, so that a resumed job need not read its corpus again.

A copy is named after the identity of every input file (name, size, and time of change or ETag) and
the settings that cut them, in `<table>/_kalm/plan/`. Other files or settings look under another
name and find nothing: then the corpus is planned again. A file that changed and kept its identity
is found by its content hash when a shard of it is read; shards that are done are not read again.

A store that refuses the copy costs a warning and the time of planning, never the job.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fsspec
import lance
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from lance.file import LanceFileSession

from kalm_encoder.errors import first_line
from pipeline.corpus.inputs import RowRange, expand_inputs, file_format, fsspec_options
from pipeline.corpus.passages import Fields
from pipeline.corpus.shards import Plan, Shard
from pipeline.run.job import EncodeJob
from pipeline.table.side_files import KEPT_PLANS, STORE_ERRORS

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of the copy and of the way corpora are cut: raise it when either changes."""
STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified")
"""What file systems call the mark that changes with a file; the first that is there."""
UNREADABLE = *STORE_ERRORS, KeyError, IndexError, pa.ArrowException
"""What a store that fails (LanceFileSession.contains: RuntimeError) or a damaged copy raises."""
SCHEMA = pa.schema(
    {
        "file": pa.int32(),
        "start": pa.int64(),
        "length": pa.int64(),
        "first_line": pa.int64(),
        "num_rows": pa.int64(),
        "content": pa.string(),
        "version": pa.int64(),
    }
)


class PlanCopy:
    """Where the plan of a job is kept.

    Attributes:
        files: the job's inputs, as listed once.
    """

    def __init__(self, job: EncodeJob) -> None:
        """Name the copy of a job's plan.

        Raises:
            InputError: no usable input.
        """
        self._uri, self._options = job.uri, job.storage_options
        self.files = expand_inputs(job.inputs, job.storage_options)
        with ThreadPoolExecutor(thread_name_prefix="identity") as pool:
            marks = list(pool.map(lambda file: _identity(file, job.storage_options), self.files))
        self._path: str | None = None
        self._kept = False
        if all(marks):
            facts = json.dumps([FORMAT, job.shard_size, job.limit, asdict(job.fields), marks])
            self._path = f"{KEPT_PLANS}/{xxhash.xxh3_128_hexdigest(facts.encode())}.parquet"

    def read(self) -> Plan | None:
        """Return the plan that was kept, with today's paths of its files; None if there is none."""
        if self._path is None:
            return None
        try:
            session = LanceFileSession(self._uri, storage_options=self._options)
            if not session.contains(self._path):
                return None
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "plan.parquet")
                session.download_file(self._path, str(file))
                plan = _from_table(pq.read_table(file), self.files)
            pa.default_memory_pool().release_unused()  # of 100,000 shards 20 MB
        except UNREADABLE as error:
            logger.warning("the kept plan cannot be used, planning again: %s", first_line(error))
            return None
        self._kept = True
        logger.info("%d shards from the plan beside %s", len(plan.shards), self._uri)
        return plan

    def write(self, plan: Plan) -> None:
        """Keep the plan of these files, unless it was read from there."""
        if self._kept:
            return
        if self._path is None:
            logger.info("the plan is not kept: some input has no time of change or ETag")
            return
        try:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "plan.parquet")
                pq.write_table(_to_table(plan, self.files), file, compression="zstd")
                session = LanceFileSession(self._uri, storage_options=self._options)
                session.upload_file(str(file), self._path)
        except UNREADABLE as error:
            logger.warning("the plan is not kept, a resume plans again: %s", first_line(error))


def _identity(file: str, storage_options: dict[str, str] | None) -> dict[str, Any] | None:
    """Return what tells one state of a file from another; None where nothing does."""
    try:
        if file_format(file) == "lance":
            version = lance.dataset(file, storage_options=storage_options).version
            return {"path": file, "version": version}
        fs, path = fsspec.core.url_to_fs(file, **fsspec_options(file, storage_options))
        info = fs.info(path)
    except (OSError, ValueError):
        return None  # planning will say what is wrong with it
    stamps = [str(info[key]) for key in STAMPS if info.get(key)]
    return (
        {"name": path.rsplit("/", 1)[-1], "size": info.get("size"), "stamp": stamps[0]}
        if stamps
        else None
    )


def _to_table(plan: Plan, files: Sequence[str]) -> pa.Table:
    """Return one row a shard; fields and columns, the same all over a file, as metadata."""
    number = {file: i for i, file in enumerate(files)}
    first = {shard.path: shard for shard in reversed(plan.shards)}
    facts = {
        number[path]: (asdict(shard.fields), shard.rows.columns) for path, shard in first.items()
    }
    columns = [[number[s.path] for s in plan.shards]]
    columns += [[getattr(s.rows, name) for s in plan.shards] for name in SCHEMA.names[1:]]
    schema = SCHEMA.with_metadata({"hash": plan.hash, "files": json.dumps(facts)})
    return pa.table(columns, schema=schema)


def _from_table(table: pa.Table, files: Sequence[str]) -> Plan:
    """Return the plan of a copy.

    Raises:
        ValueError: it is not what was written.
    """
    metadata = table.schema.metadata or {}
    facts = {
        int(number): (Fields(**fields), tuple(columns))
        for number, (fields, columns) in json.loads(metadata[b"files"]).items()
    }
    shards: list[Shard] = []
    rows = zip(*(table[name].to_pylist() for name in SCHEMA.names), strict=True)
    for file, start, length, line, num_rows, content, version in rows:
        fields, columns = facts[file]
        part = RowRange(start, length, line, num_rows, content, columns, version)
        shards.append(Shard(len(shards), files[file], fields, part))
    plan = Plan(tuple(shards))
    if plan.hash != metadata[b"hash"].decode():
        raise ValueError(f"its hash is {plan.hash}, {metadata[b'hash'].decode()} was written")
    return plan
