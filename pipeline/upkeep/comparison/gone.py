"""Ids that one version of a source table has and a later one lacks, found by the workers.

Row ids do not tell what is gone: an id may be deleted and written again as another row. So the ids
of both versions are hashed into partitions, of which no process holds more than one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import pyarrow as pa
import xxhash

from kalm_encoder.table.location import Location
from pipeline.messages import Part, Place
from pipeline.table.duplicates import GROUP_ROWS, HashIds, hashed_schema, rows_at
from pipeline.table.fragments import fragment_groups, fragments_key, open_version
from pipeline.table.partitions import HIGH, LOW, ROW, num_partitions, read_partition
from pipeline.table.side_files import STEPS
from pipeline.table.steps import DoPart, Steps, VersionWork, exchange

READ_AT_ONCE = 10_000
"""Most ids that one query reads."""


@dataclass(frozen=True, kw_only=True)
class FindGone(VersionWork):
    """Partitions of hashes, of which those that the later version lacks are found.

    `table` and `version` are the source and the earlier one of its versions.

    Attributes:
        column: Column of the ids.
        before: Files with the hashes of this version.
        now: Files with those of the later one.
    """

    column: str
    before: tuple[Location, ...]
    now: tuple[Location, ...]

    def load(self, place: Place) -> DoPart:
        """Open the source. A part is the number of a partition, its result the ids."""
        dataset = self.dataset()

        def find(number: int) -> list[str]:
            before, now = (
                pa.concat_tables([hashed_schema().empty_table(), *read_partition(files, number)])
                for files in (self.before, self.now)
            )
            gone = before.join(now, keys=[HIGH, LOW], join_type="left anti")
            rows = sorted(gone[ROW].to_pylist())
            ids: dict[str, None] = {}
            for start in range(0, len(rows), READ_AT_ONCE):
                found = rows_at(dataset, rows[start : start + READ_AT_ONCE], [self.column])
                ids |= dict.fromkeys(found[self.column].cast(pa.string()).to_pylist())
            return list(ids)

        return find


def ids_gone(
    steps: Steps, table: Location, source: Location, column: str, before: int, now: int
) -> list[str]:
    """Return the ids that a source has in one version and not in a later one, each once.

    Args:
        steps: How the parts are done.
        table: Address of the table below which the workers exchange hashes.
        source: Address of the source.
        column: Its column of ids, strings or integers.
        before: The version.
        now: The later version.

    Raises:
        IncompleteError: If some parts failed for good; the others are not done again.
        TableError: If there is no such version, or the store refuses.
    """
    datasets = [open_version(source, version) for version in (before, now)]
    groups = [fragment_groups(dataset, GROUP_ROWS) for dataset in datasets]
    partitions = num_partitions(sum(dataset.count_rows() for dataset in datasets))
    facts = [source.uri, column, before, now, *map(fragments_key, datasets)]
    name = f"gone-{xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())}"
    is_small = max(partitions, *map(len, groups)) <= 1
    with exchange(steps, table / STEPS, name, is_small=is_small) as exchanged:
        hashed: list[tuple[Location, ...]] = []
        for version, some in zip((before, now), groups, strict=True):
            work = HashIds(
                table=source, version=version, column=column, partitions=partitions,
                folder=exchanged.folder,
            )  # fmt: skip
            parts = [Part(number, ids) for number, ids in enumerate(some)]
            files = exchanged.results(f"reading the ids of version {version}", work, parts)
            hashed.append(tuple(work.folder / file for file in files))
        finding = FindGone(
            table=source, version=before, column=column, before=hashed[0], now=hashed[1]
        )
        parts = [Part(number, number) for number in range(partitions)]
        found = exchanged.results("finding deleted ids", finding, parts)
    return [id for some in found for id in some]
