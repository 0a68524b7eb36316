"""One process's hold on a table: an epoch of its own and a chain of versions.

Whoever wants to change a table first writes an epoch and its own name into the schema metadata.
The commit that does so conflicts with every other operation made from an older version, so whoever
held the table before is fenced off: its next commit is refused by Lance. For this to hold, each
commit names the version this process last made as the one it read, and whoever re-reads the table
looks first whose it is.

Two operations of Lance can be that commit. A Merge that changes no data conflicts with everything,
but names every fragment: 200 MB and 5 s more at 100,000. A Project names none; it conflicts with
Append, Merge, Project and Overwrite in both directions but lets Delete, Update and Rewrite through.
While shards are added none of these is committed, so there it is the Project, else the Merge.
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
"""Life of a table: shards are added; all are there; a sync or delete is under way; finished."""
ATTEMPTS = 10


class TableClaim:
    """The write side of one table.

    Attributes:
        location: Address of the table.
        dataset: at the version this process last made or read.
        metadata: of its schema.
        owner: this process's name, random.
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        self.owner = uuid.uuid4().hex
        self.refresh(self.open())

    def open(self) -> lance.LanceDataset:
        """Open the latest version."""
        return open_to_write(self.location)

    @property
    def state(self) -> str:
        """One of LOADING, SEALED, CHANGING and COMPLETE."""
        return self.metadata[STATE]

    @property
    def epoch(self) -> int:
        """How often the table was taken over, as last seen."""
        return int(self.metadata[EPOCH])

    @property
    def is_mine(self) -> bool:
        """Whether this process holds the table, as last seen."""
        return self.metadata[OWNER] == self.owner

    def refresh(self, dataset: lance.LanceDataset) -> None:
        """Go on from this version, whoever made it."""
        self.move_to(dataset)

    def move_to(self, dataset: lance.LanceDataset) -> None:
        """Go on from a version of which only the metadata is new."""
        self.dataset = dataset
        metadata = dataset.schema.metadata or {}
        self.metadata: dict[str, str] = {k.decode(): v.decode() for k, v in metadata.items()}

    def take_over(self, metadata: dict[str, str] | None = None, *, unchanged: bool = False) -> None:
        """Bump the epoch, which fences off whoever held the table; change other metadata with it.

        Args:
            metadata: to change.
            unchanged: only if nobody changed the table since this process read it.

        Raises:
            FencedError: somebody did.
            KalmError: others take it over all the time.
        """
        for attempt in range(ATTEMPTS):
            claim = {EPOCH: str(self.epoch + 1), OWNER: self.owner}
            try:
                self._change_once({**(metadata or {}), **claim})
            except (CommitConflictError, OSError) as error:
                logger.warning("cannot take %s over: %s", self.location, first_line(error))
                self.refresh(self._reopen(error))
                if attempt == ATTEMPTS - 1 and isinstance(error, OSError):
                    raise
            if self.is_mine and self.metadata.items() >= (metadata or {}).items():
                return  # where the reply was lost, the table still says whose it is
            if unchanged:
                raise self._fenced()
            _back_off(attempt)
        raise KalmError(f"{self.location} is being written by {ATTEMPTS} other drivers: stop them")

    def change(self, metadata: dict[str, str]) -> None:
        """Change schema metadata in a commit that conflicts with every other one.

        Raises:
            FencedError: another process took over.
            OSError: the store refused for good; nothing changed.
        """

        def step() -> None:
            if not self.metadata.items() >= metadata.items():
                self._change_once(metadata)

        self.retry(step)

    def _change_once(self, metadata: dict[str, str]) -> None:
        schema = self.dataset.schema.with_metadata({**self.metadata, **metadata})
        lance_schema = LanceSchema.from_pyarrow(schema)
        if self.state == LOADING:
            operation = LanceOperation.Project(lance_schema)
        else:
            fragments = [f.metadata for f in self.dataset.get_fragments()]
            operation = LanceOperation.Merge(fragments, lance_schema)
        self.move_to(self.commit_operation(operation))

    def commit_operation(self, operation: LanceOperation.BaseOperation) -> lance.LanceDataset:
        """Commit an operation against the version this process last saw; return the new one."""
        return lance.LanceDataset.commit(
            self.dataset,  # by address Lance would read the version again, and be half as fast
            operation,
            read_version=self.dataset.version,
            storage_options=self.location.options,
            max_retries=0,
        )

    def retry(self, step: Callable[[], None]) -> None:
        """Run a step that commits; where its outcome is unknown, read the table and run it again.

        Args:
            step: reads `self.dataset`, commits, and does nothing where its work is done already.

        Raises:
            FencedError: another process took over.
            OSError: the store keeps refusing; the step has not been committed.
        """
        for attempt in range(ATTEMPTS):
            if not self.is_mine:
                raise self._fenced()
            try:
                return step()
            except (CommitConflictError, OSError) as error:
                # A conflict, a lost reply or a time-out: the table decides.
                logger.warning("commit failed, reading the table: %s", first_line(error))
                self.refresh(self._reopen(error))
                if not self.is_mine:
                    raise self._fenced() from error
                if attempt == ATTEMPTS - 1:
                    raise
            _back_off(attempt)

    def _reopen(self, cause: Exception) -> lance.LanceDataset:
        """Open the latest version, waiting for a store that does not answer."""
        for attempt in range(ATTEMPTS):
            try:
                return self.open()
            except TableError:
                _back_off(attempt)
        raise cause

    def _fenced(self) -> FencedError:
        return FencedError(
            f"another command took {self.location} over (its epoch is {self.epoch}). That one "
            "continues the work; this one stops"
        )


def _back_off(attempt: int) -> None:
    time.sleep(min(0.05 * 2**attempt, 2.0))
