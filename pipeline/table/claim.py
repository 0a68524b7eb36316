"""The right of one process to write to a table: its name, its epoch and a chain of versions.

A process that wants to change a table first commits a new epoch and its own name into the schema
metadata. That commit conflicts with every operation that was prepared from an older version, so the
process that held the table before is fenced off: Lance refuses its next commit. This only works if
every commit names, as the version it read, the version that this process made last, and if a
process that reads the table again first checks whether the table is still its own.

Two Lance operations can be that commit. A Merge that changes no data conflicts with everything, but
it lists every fragment, which costs 200 MB and 5 s more at 100,000 fragments. A Project lists none.
It conflicts with Append, Merge, Project and Overwrite in both directions but lets Delete, Update
and Rewrite through. While shards are added, nobody commits any of those three, so the claim uses
the Project in that state and the Merge in all others.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable

import lance
from lance.commit import CommitConflictError
from lance.dataset import LanceOperation
from lance.schema import LanceSchema

from kalm_encoder.errors import FencedError, KalmError, TableError, first_line
from kalm_encoder.table.location import Location
from pipeline.table.fragments import open_to_write

logger = logging.getLogger(__name__)

EPOCH, OWNER, STATE = "kalm.epoch", "kalm.owner", "kalm.state"
LOADING, SEALED, CHANGING, COMPLETE = "loading", "sealed", "changing", "complete"
"""States of a table: shards are added; all are there; a sync or delete is under way; finished."""
ATTEMPTS = 10
"""How often a commit, or a store that does not answer, is tried before the process gives up."""


def metadata_of(dataset: lance.LanceDataset) -> dict[str, str]:
    """Return the schema metadata of a version of a table."""
    return {k.decode(): v.decode() for k, v in (dataset.schema.metadata or {}).items()}


class TableClaim:
    """A process's claim to one table, through which it commits.

    Attributes:
        location: Address of the table.
        dataset: The table at the version that this process made or read last.
        metadata: Schema metadata of that version.
        owner: Random name of this process.
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        self.owner = uuid.uuid4().hex
        self.refresh(open_to_write(location))

    @property
    def state(self) -> str:
        """LOADING, SEALED, CHANGING or COMPLETE."""
        return self.metadata[STATE]

    @property
    def epoch(self) -> int:
        """How often the table had been claimed when this process last looked."""
        return int(self.metadata[EPOCH])

    @property
    def is_mine(self) -> bool:
        """Whether this process held the table when it last looked."""
        return self.metadata[OWNER] == self.owner

    def refresh(self, dataset: lance.LanceDataset) -> None:
        """Continue from a version that any process may have made."""
        self.move_to(dataset)

    def move_to(self, dataset: lance.LanceDataset) -> None:
        """Continue from a version of which only the schema metadata need be read."""
        self.dataset = dataset
        self.metadata = metadata_of(dataset)

    def take_over(self, metadata: dict[str, str] | None = None, *, unchanged: bool = False) -> None:
        """Claim the table, which fences off its holder, and change metadata in the same commit.

        Args:
            metadata: Other schema metadata to change.
            unchanged: Give up if anybody has changed the table since this process read it.

        Raises:
            FencedError: If somebody changed the table and `unchanged` is set.
            KalmError: If other processes kept changing the table at the same time.
            OSError: If the store kept refusing; nothing changed.
        """
        wanted, seen = {**(metadata or {}), OWNER: self.owner}, self.dataset.version
        self._attempt(
            lambda: self._set(wanted),
            lambda: not unchanged or self.is_mine or self.dataset.version == seen,
        )

    def change(self, metadata: dict[str, str]) -> None:
        """Change schema metadata in a commit that conflicts with all others.

        Raises:
            FencedError: If another process claimed the table.
            OSError: If the store kept refusing; nothing changed.
        """
        self.retry(lambda: self._set(metadata))

    def _set(self, metadata: dict[str, str]) -> None:
        """Commit metadata that the table does not hold yet; a new owner makes a new epoch."""
        if self.metadata.items() >= metadata.items():
            return
        epoch = self.epoch + (OWNER in metadata)
        changed = {**self.metadata, **metadata, EPOCH: str(epoch)}
        schema = LanceSchema.from_pyarrow(self.dataset.schema.with_metadata(changed))
        if self.state == LOADING:
            operation = LanceOperation.Project(schema)
        else:
            fragments = [f.metadata for f in self.dataset.get_fragments()]
            operation = LanceOperation.Merge(fragments, schema)
        self.move_to(self.commit_operation(operation))

    def commit_operation(self, operation: LanceOperation.BaseOperation) -> lance.LanceDataset:
        """Commit an operation against the version last seen and return the new version."""
        return lance.LanceDataset.commit(
            self.dataset,  # given the address, Lance would read the version again: half as fast
            operation,
            read_version=self.dataset.version,
            storage_options=self.location.options,
            max_retries=0,
        )

    def retry(self, step: Callable[[], None]) -> None:
        """Run a step that commits; while its outcome is unknown, read the table and run it again.

        Args:
            step: Reads `self.dataset` and commits. It must do nothing if its work is done already.

        Raises:
            FencedError: If another process claimed the table.
            KalmError, OSError: As in `take_over`; the step has not been committed.
        """
        if not self.is_mine:
            raise self._fenced()
        self._attempt(step, lambda: self.is_mine)

    def look_again(self) -> None:
        """Continue from the latest version, if no other process claimed the table.

        Raises:
            FencedError: If one did.
        """
        self.refresh(open_to_write(self.location))
        if not self.is_mine:
            raise self._fenced()

    def _attempt(self, step: Callable[[], None], may_go_on: Callable[[], bool]) -> None:
        """Run a step until it succeeds; after each failure, `may_go_on` looks at the table."""
        failure: Exception | None = None
        for attempt in range(ATTEMPTS):
            try:
                if failure:
                    # A conflict, a lost reply and a time-out look alike: only the table can tell.
                    self.refresh(open_to_write(self.location))
                    if not may_go_on():
                        raise self._fenced() from failure
                return step()
            except (CommitConflictError, OSError) as error:
                failure = error
            except TableError as error:  # The store does not answer: the first error says more.
                failure = failure or error
            logger.warning("a commit failed, reading the table: %s", first_line(failure))
            time.sleep(min(0.05 * 2**attempt, 2.0))
        if failure and not isinstance(failure, CommitConflictError):
            raise failure
        raise KalmError(f"other commands keep changing {self.location}: stop them")

    def _fenced(self) -> FencedError:
        return FencedError(
            f"another command took {self.location} over (its epoch is {self.epoch}). That one "
            "continues the work; this one stops"
        )
