"""The plan kept beside its table, so that a resumed job need not read its corpus again.

A kept plan is named after the identity of every input file (name, size, and time of change or ETag)
and the settings that cut the files, in `<table>/_kalm/plan/`. Other files or settings look under
another name and find nothing: then the corpus is planned again. A file that changed but kept its
identity is found by its content hash when a shard of it is read; shards that are done are not read.

A store that refuses a kept plan costs a warning and the time of planning, never the job.
"""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import lance
import xxhash
from pydantic import TypeAdapter

from kalm_encoder.errors import InputError, first_line
from pipeline.corpus.access import open_store, readable
from pipeline.corpus.inputs import InputFile, RowRange
from pipeline.corpus.passages import Fields
from pipeline.corpus.shards import Plan, Shard
from pipeline.run.job import EncodeJob
from pipeline.table.side_files import KEPT_PLANS, STORE_ERRORS, read_text, write_text

logger = logging.getLogger(__name__)

FORMAT = 4
"""Version of the file and of the way corpora are cut. Raise it when either changes."""
STAMPS = ("blob_id", "ETag", "etag", "mtime", "LastModified", "last_modified")
"""File systems give the mark that changes with a file these names; the first found counts."""
UNREADABLE = *STORE_ERRORS, IndexError
"""What a store that fails or a damaged file raises. pydantic's errors are ValueErrors."""
KEPT = TypeAdapter(tuple[str, list[tuple[int, Fields, RowRange]]])
"""A kept plan: its hash, and of each shard the number of its file among the inputs, its fields and
its rows. It has no path, so that it holds for a corpus that was moved."""


class KeptPlan:
    """The place where the plan of a job is kept.

    Attributes:
        files: The job's input files, as listed once.
    """

    def __init__(self, job: EncodeJob) -> None:
        """Find out under which name the plan of a job is kept.

        Raises:
            InputError: There is no usable input.
        """
        self._table = job.table
        self.files = job.files()
        with ThreadPoolExecutor(thread_name_prefix="identity") as pool:
            marks = list(pool.map(lambda file: _identity(file, job.storage_options), self.files))
        self._path: str | None = None
        if all(marks):
            facts = json.dumps([FORMAT, job.shard_size, job.limit, asdict(job.fields), marks])
            self._path = f"{KEPT_PLANS}/{xxhash.xxh3_128_hexdigest(facts.encode())}.json"

    def read(self) -> Plan | None:
        """Return the plan that was kept, with today's paths of its files; None if there is none."""
        if self._path is None:
            return None
        try:
            session = self._table.file_session()
            if not session.contains(self._path):
                return None
            written, shards = KEPT.validate_json(read_text(session, self._path))
            same: dict[Fields, Fields] = {}  # one object per kind of file, not per shard
            plan = Plan(
                tuple(
                    Shard(number, self.files[file], same.setdefault(fields, fields), rows)
                    for number, (file, fields, rows) in enumerate(shards)
                )
            )
            if plan.hash != written:
                raise ValueError(f"its hash is {plan.hash}, {written} was written")
        except UNREADABLE as error:
            logger.warning("the kept plan cannot be used, planning again: %s", first_line(error))
            return None
        logger.info("%d shards read from the plan kept beside %s", len(plan.shards), self._table)
        return plan

    def write(self, plan: Plan) -> None:
        """Keep the plan of these files."""
        if self._path is None:
            logger.info("the plan is not kept: some input has no time of change or ETag")
            return
        number = {file: i for i, file in enumerate(self.files)}
        shards = [(number[shard.file], shard.fields, shard.rows) for shard in plan.shards]
        content = KEPT.dump_json((plan.hash, shards), exclude_defaults=True)
        try:
            write_text(self._table.file_session(), self._path, content.decode())
        except STORE_ERRORS as error:
            logger.warning("the plan is not kept, a resume plans again: %s", first_line(error))


def _identity(
    file: InputFile, storage_options: dict[str, str] | None
) -> list[str | int | None] | None:
    """Return what tells one state of a file from another; None where nothing does."""
    try:
        if file.format == "lance":
            return [file.path, lance.dataset(file.path, storage_options=storage_options).version]
        with readable(file.path):
            fs, path = open_store(file.path, storage_options)
            info = fs.info(path)
    except (InputError, OSError, ValueError):
        return None  # planning will say what is wrong with it
    stamp = next((str(info[key]) for key in STAMPS if info.get(key)), None)
    return [path.rsplit("/", 1)[-1], info.get("size"), stamp] if stamp else None
