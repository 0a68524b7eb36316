"""Looks at some rows of a corpus before the first forward, for what would end its job later.

Planning parses few of the rows that it cuts into shards. Without this look, a wrong id field or a
column of nulls would show when the workers have encoded it, and repeated ids when all is encoded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from kalm_encoder.errors import InputError, TooManyRejectsError, first_line
from pipeline.corpus.passages import Fields, Reject
from pipeline.corpus.shards import Plan, Shard, ShardReader, ShardRows
from pipeline.run.job import EncodeJob
from pipeline.table.rejects import RejectStore

logger = logging.getLogger(__name__)

MOST_ROWS = 20_000
"""Most rows that are looked at; reading and parsing them takes well under a second."""
SPREAD = 8
"""How many files, and how many shards of files that can be read anywhere, are looked into."""


def first_look(job: EncodeJob, plan: Plan) -> None:
    """Refuse a job that some of its rows show to fail, and warn of what they show beside that.

    Raises:
        InputError: If an id is repeated, and the job does not say which row counts.
        TooManyRejectsError: If more rows cannot be used than the job allows. They are stored.
    """
    store, rejected, empty = RejectStore(job.table), list[Reject](), 0
    store.clear()  # What is there comes from an earlier attempt, with other input.
    found: dict[str, str] = {}  # The place of each id.
    repeated: list[str] = []
    num_rows = 0
    for shard, (passages, rejects, _) in _read(job, some_shards(plan)):
        store.write(shard.id, rejects)
        rejected += rejects
        num_rows += shard.rows.num_rows
        empty += sum(not passage.text for passage in passages)
        for passage in passages:
            place = f"{shard.path} line {passage.line}"
            first = found.setdefault(passage.id, place)
            if first != place:
                repeated.append(f"{passage.id!r} in {first} and {place}")
    remedy = id_field_remedy(s.fields for s in plan.shards)
    allowed = int(job.max_rejected * plan.num_rows)
    if len(rejected) > allowed:
        raise TooManyRejectsError(
            f"{store.too_many(rejected, len(rejected), allowed, plan.num_rows)}. {num_rows} rows "
            "were looked at and none is encoded yet: mend the rejected ones and run the same "
            "command again, name other fields with --id-field, --text-field or --title-field, give "
            "other types with --keep, or raise --max-rejected"
        )
    if repeated and job.on_duplicate == "error":
        raise InputError(
            f"of {num_rows} rows that were looked at before any is encoded, {len(repeated)} repeat "
            f"an id, such as {repeated[0]}. {remedy}; or keep one row of each id "
            "with --on-duplicate first or last"
        )
    if repeated:
        logger.warning(
            "of %d rows that were looked at, %d repeat an id and will be dropped, such as %s. %s",
            num_rows, len(repeated), repeated[0], remedy,
        )  # fmt: skip
    if empty:
        logger.warning(
            "of %d rows that were looked at, %d have no text. If it is in another field, stop this "
            "run and name the field with --text-field", num_rows, empty,
        )  # fmt: skip


def id_field_remedy(fields: Iterable[Fields]) -> str:
    """Return which fields the ids of a corpus come from, and how another is chosen."""
    names = " and ".join(sorted({repr(chosen.id) for chosen in fields}))
    return f"The ids are those of field {names}: if another holds them, name it with --id-field"


def some_shards(plan: Plan) -> list[Shard]:
    """Choose the shards to look at: all of a small plan, else some with MOST_ROWS rows in all.

    They are the first ones of files that begin alike, since one may be a copy of the other, of some
    other files, and shards at even distances of the files that can be read anywhere. Of a packed
    file only the first shard is quick to read, and a Parquet file is read by whole row groups.
    """
    if plan.num_rows <= MOST_ROWS and len(plan.shards) <= 4 * SPREAD:
        return list(plan.shards)
    begins: dict[str, list[Shard]] = {}
    firsts = [next(shards) for _, shards in groupby(plan.shards, lambda shard: shard.file)]
    for shard in firsts:
        begins.setdefault(shard.rows.content, []).append(shard)
    copies = [shard for alike in begins.values() if len(alike) > 1 for shard in alike[:2]]
    anywhere = [s for s in plan.shards if not s.file.is_packed and s.file.format != "parquet"]
    chosen: dict[int, Shard] = {}
    left = MOST_ROWS
    for shard in (*copies[:SPREAD], *_spread(firsts), *_spread(anywhere)):
        if not chosen or (shard.number not in chosen and shard.rows.num_rows <= left):
            chosen[shard.number] = shard
            left -= shard.rows.num_rows
    return [chosen[number] for number in sorted(chosen)]


def _spread(shards: Sequence[Shard]) -> Sequence[Shard]:
    """Return SPREAD of the shards, at even distances."""
    return shards[:: max(1, -(-len(shards) // SPREAD))]


def _read(job: EncodeJob, shards: Sequence[Shard]) -> Iterator[tuple[Shard, ShardRows]]:
    reader = ShardReader(job.storage_options)
    for shard in shards:
        try:
            rows = reader.read(shard)
        except InputError as error:  # The worker that gets the shard tries again, and reports it.
            logger.warning("cannot look at shard %s yet: %s", shard.id, first_line(error))
        else:
            yield shard, rows
