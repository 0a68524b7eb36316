"""Changes of a corpus instead of the whole of it: a feed of records, or two versions of a table.

A feed is JSON lines in which `op` is upsert or delete; the last record of an id counts. The table
remembers which feeds it has applied, as lengths and hashes of what it read, at the end of each
file. A feed that begins with one of these is applied from there on, and one that is no longer has
nothing new. Any other is applied from its start.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import lance
import numpy as np
import xxhash

from kalm_encoder.errors import InputError
from kalm_encoder.table.location import Location
from pipeline.corpus.access import open_text
from pipeline.corpus.passages import Reject, to_passage
from pipeline.corpus.shards import Plan, ShardReader
from pipeline.table.ledger import HUB
from pipeline.table.steps import Steps
from pipeline.upkeep.comparison.corpus import SHARD_BITS, Places, places_of
from pipeline.upkeep.comparison.gone import ids_gone

logger = logging.getLogger(__name__)

FEEDS, SOURCE = "kalm.feeds", "kalm.source"
"""Metadata keys: [length, hash] of each feed that was applied, and [address, version] of a source
table that was synced."""
REMEMBERED = 1000
"""Most ends of feeds that a table remembers."""
UPSERT, DELETE = "upsert", "delete"
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Feed:
    """What changed in a corpus.

    Attributes:
        lines: (n,) places of the rows that count, with their lines, ascending; see corpus.py.
        deleted: Ids of the passages that are gone.
        record: Schema metadata by which the table remembers that this was applied.
        rejects: Records that are no change.
    """

    lines: Places
    deleted: list[str]
    record: dict[str, str]
    rejects: list[Reject] = field(default_factory=list)


def read_feed(plan: Plan, metadata: dict[str, str], options: dict[str, str] | None) -> Feed:
    """Read what the records of a feed do.

    Args:
        plan: Shards of its files, in their order.
        metadata: Schema metadata of the table.
        options: Storage options of the files.

    Raises:
        InputError: If a file holds no JSON lines.
    """
    paths = list(dict.fromkeys(shard.path for shard in plan.shards))
    if other := [s.path for s in plan.shards if s.file.format != "jsonl"]:
        raise InputError(f"{other[0]} holds no JSON lines, in which --changes expects its records")
    applied = json.loads(metadata.get(FEEDS, "[]"))
    known, ends, lines = _known_part(paths, applied, options)
    if applied and not known:
        logger.warning("the changes do not continue what was applied: all of them are compared")
    record = {FEEDS: json.dumps([*(f for f in applied if f not in ends), *ends][-REMEMBERED:])}
    if ends[-1] in applied:
        return Feed(np.zeros(0, np.int64), [], {FEEDS: metadata[FEEDS]})
    reader = ShardReader(options)
    last: dict[str, tuple[str, int]] = {}
    rejects, unreadable = [], []
    for shard in plan.shards:
        for line, row in reader.raw(shard):
            if line <= lines.get(shard.path, 0):
                continue
            place = shard.number << SHARD_BITS | line
            found = to_passage(row, shard.fields, shard.path, line)
            if isinstance(found, Reject) and not found.id:
                unreadable.append(place)
            if not isinstance(row, dict):
                continue
            op, id = row.get("op"), row.get(shard.fields.id)
            if op not in (UPSERT, DELETE):
                reason = f"field 'op' holds {str(op)[:40]!r}, neither {UPSERT} nor {DELETE}"
                named = id if isinstance(id, str) else None
                rejects.append(Reject(shard.path, line, reason, named))
            elif isinstance(id, str | int) and not isinstance(id, bool):
                last[str(id)] = (op, place)
    upserts = [place for op, place in last.values() if op == UPSERT]
    deleted = [id for id, (op, _) in last.items() if op == DELETE]
    return Feed(np.unique(np.array(unreadable + upserts, np.int64)), deleted, record, rejects)


def _known_part(
    paths: Sequence[str], applied: Sequence[list[object]], options: dict[str, str] | None
) -> tuple[int, list[list[object]], dict[str, int]]:
    """Find out how much of a feed the table has applied.

    Returns:
        The bytes of the known part; length and hash of the feed up to the end of each file; and,
        per file, the number of its lines that end in the known part.
    """
    known_ends = sorted({int(str(length)) for length, _ in applied})
    digest, length, ends = xxhash.xxh3_128(), 0, []
    known, lines, known_lines = 0, dict.fromkeys(paths, 0), {}
    for path in paths:
        with open_text(path, options) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                cuts = [end - length for end in known_ends if length < end <= length + len(chunk)]
                begin = 0
                for cut in [*cuts, len(chunk)]:
                    digest.update(chunk[begin:cut])
                    lines[path] += chunk.count(b"\n", begin, cut)
                    begin = cut
                    if [length + cut, digest.hexdigest()] in applied:
                        known, known_lines = length + cut, dict(lines)
                length += len(chunk)
        ends.append([length, digest.hexdigest()])
    return known, ends, known_lines


def changed_since(
    steps: Steps, table: Location, plan: Plan, version: int, metadata: dict[str, str]
) -> Feed | None:
    """Find what changed in a source table since one of its versions.

    Args:
        steps: How the ids of both versions are compared.
        table: Address of the table; its storage options are those of the source too.
        plan: Shards of the source.
        version: The version that was synced last.
        metadata: Schema metadata of the table.

    Returns:
        None if the table was not synced from this version of this source, or the source does not
        keep track of its rows: then all of it has to be compared. The log says so.

    Raises:
        InputError: If the source is not one Lance table.
    """
    record = source_record(plan)
    if record is None:
        raise InputError("--since compares two versions of a source: give one Lance table")
    path, now = plan.shards[0].path, plan.shards[0].rows.version
    source = lance.dataset(path, version=now, storage_options=table.options)
    why, column = None, plan.shards[0].fields.id
    if json.loads(metadata.get(SOURCE, "null")) != [path, version]:
        why = f"the table was not synced from version {version} of {path}"
    elif not source.has_stable_row_ids:
        why = f"{path} has no stable row ids, so that it does not tell which rows changed"
    elif version not in {v["version"] for v in source.versions()}:
        why = f"{path} has no version {version} any more"
    elif column not in source.checkout_version(version).schema.names:
        why = f"version {version} of {path} has no column {column!r}"
    if why:
        logger.warning("%s: all rows are compared", why)
        return None
    gone = ids_gone(steps, table, Location(path, table.options), column, version, now)
    rows = ((path, row + 1) for row in _changed_rows(source, version))
    return Feed(places_of(plan.shards, rows), gone, record)


def _changed_rows(source: lance.LanceDataset, version: int) -> Iterator[int]:
    """Yield the offsets of the rows that changed since a version."""
    updated, begin = "_row_last_updated_at_version", 0
    for batch in source.scanner(columns=[updated]).to_batches():
        yield from (np.flatnonzero(batch[updated].to_numpy() > version) + begin).tolist()
        begin += batch.num_rows


def source_record(plan: Plan) -> dict[str, str] | None:
    """Return by what the table remembers its source; None if that is not one Lance table."""
    sources = {(shard.path, shard.rows.version) for shard in plan.shards}
    if len(sources) != 1 or plan.shards[0].file.format != "lance":
        return None
    return {SOURCE: json.dumps(list(sources.pop()))}


def hub_record(plan: Plan) -> dict[str, str]:
    """Return by what the table remembers the commits of the hub that it was synced from."""
    return {HUB: found} if (found := plan.hub_commits) else {}
