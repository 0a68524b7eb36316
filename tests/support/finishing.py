"""A process that finishes a table and is killed on the way. It imports little: it starts fast."""

import os
import signal

from kalm_encoder.table.location import Location
from pipeline.table import duplicates, finish, indexes, partitions
from pipeline.table.finish import SealedTable
from pipeline.table.steps import Steps
from pipeline.upkeep.delete import compact
from pipeline.workers.local import in_process


def finish_and_die(uri, at, rows):
    """Finish a table of fragments with so many rows; die after the first part of a step."""
    duplicates.GROUP_ROWS, partitions.PARTITION_ROWS = 4 * rows, 6 * rows
    finish.FRAGMENT_ROWS, indexes.GROUP_ROWS = 3 * rows, 5 * rows

    def tell(name, done, total):
        if name == at and done:
            os.kill(os.getpid(), signal.SIGKILL)

    SealedTable(Location(uri)).finish(Steps(in_process, tell), index_columns=["year", "tags"])


def compact_and_die(uri):
    """Compact a table; die after the first part of the first step."""

    def execute(work, parts):
        for _ in in_process(work, parts):
            os.kill(os.getpid(), signal.SIGKILL)
        yield

    compact(Location(uri), execute)
