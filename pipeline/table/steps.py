"""Steps that touch all rows of a table or a corpus: cut into parts, done on the workers.

The results of the parts may be recorded in a folder. A command that is killed and started again
then does only those parts that were not recorded.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import lance
from lance.file import LanceFileSession
from tqdm import tqdm

from kalm_encoder.errors import IncompleteError
from kalm_encoder.table.location import Location
from pipeline import logs
from pipeline.messages import Executor, Failure, Part, Place, Task, Work
from pipeline.table.fragments import open_version
from pipeline.table.side_files import is_data, read_text, write_text

logger = logging.getLogger(__name__)

LOG_EVERY_S = 15.0
"""Least number of seconds between two log lines about the progress of a step."""
SHOWN_FAILURES = 20
"""Failed parts that an error names; the log names all of them."""

DoPart = Callable[[Any], Any]
"""Does what `Part.what` says; its result is a JSON value."""


@dataclass(frozen=True)
class PartResult:
    """The result of one part, as it travels to the driver."""

    part: Part
    value: Any


class StepTask(Task):
    """A step that is loaded in the process of a worker."""

    def __init__(self, do_part: DoPart) -> None:
        self._do_part = do_part

    def do(self, unit: Part) -> PartResult:
        """Do one part."""
        return PartResult(unit, self._do_part(unit.what))


@dataclass(frozen=True, kw_only=True)
class StepWork(Work):
    """The work of one step."""

    @abstractmethod
    def load(self, place: Place) -> DoPart:
        """Load in this process what the parts need, and return the function that does one."""

    def start(self, place: Place) -> StepTask:
        """Load in this process what the parts need."""
        return StepTask(self.load(place))


@dataclass(frozen=True, kw_only=True)
class VersionWork(StepWork):
    """The work of one step on one version of the table.

    Attributes:
        version: The version.
    """

    version: int

    def dataset(self) -> lance.LanceDataset:
        """Open the version.

        Raises:
            TableError: If there is no table or no such version, or the store refuses.
        """
        return open_version(self.table, self.version)


def _tell_nobody(name: str, done: int, total: int) -> None:
    """Leave it at the bar and the log lines."""


@dataclass(frozen=True)
class Steps:
    """How a command does its steps.

    Attributes:
        execute: Does the parts: in this process or on Ray workers.
        tell: Called with the name of a step, the parts done and the parts in all.
    """

    execute: Executor
    tell: Callable[[str, int, int], None] = _tell_nobody

    def do(
        self, name: str, work: StepWork, parts: Sequence[Part], folder: Location | None = None
    ) -> Generator[tuple[Part, Any]]:
        """Do all parts of a step and yield each with its result, in any order.

        Args:
            name: What the step does, such as "finding repeated ids", for people.
            work: What a worker loads.
            parts: The parts, numbered from 0.
            folder: Where results are recorded and found again. Its name must stand for all that
                the results depend on. None records nothing.

        Raises:
            IncompleteError: If some parts failed for good; those that did not are recorded.
        """
        session = None if folder is None else folder.file_session()
        known = {} if session is None else _recorded(session)
        pending = [part for part in parts if part.number not in known]
        for part in parts:
            if part.number in known:
                yield part, known[part.number]
        failures: list[Failure] = []
        began = logged = time.monotonic()
        done = len(parts) - len(pending)
        is_quiet = len(parts) == 1 or not sys.stderr.isatty() or logs.current().format == logs.JSON
        with (
            tqdm(desc=name, total=len(parts), initial=done, unit=" parts", disable=is_quiet) as bar,
            closing(self.execute(work, pending)) as outcomes,
        ):
            self.tell(name, done, len(parts))
            for outcome in outcomes if pending else ():
                if isinstance(outcome, Failure):
                    failures.append(outcome)
                    with logs.in_shard(outcome.unit.id):
                        logger.error("gave up %s of %s: %s", outcome.unit.id, name, outcome.reason)
                elif outcome is not None:
                    if session is not None:
                        text = json.dumps(outcome.value)
                        write_text(session, f"{outcome.part.number}.json", text)
                    done += 1
                    bar.update()
                    self.tell(name, done, len(parts))
                    yield outcome.part, outcome.value
                if bar.disable and time.monotonic() - logged >= LOG_EVERY_S:
                    logged = time.monotonic()
                    logger.info(
                        "%s: %d of %d parts in %.0f s", name, done, len(parts), logged - began
                    )
        if failures:
            lines = [f"{failure.unit.id}: {failure.reason}" for failure in failures]
            raise IncompleteError(
                f"{name} of {work.table}: {len(failures)} of {len(parts)} parts failed. Mend the "
                "cause and run the same command again.\n" + "\n".join(lines[:SHOWN_FAILURES])
            )

    def results(
        self, name: str, work: StepWork, parts: Sequence[Part], folder: Location | None = None
    ) -> list[Any]:
        """Do all parts of a step as `do` does, and return their results in the order of the parts.

        Raises:
            IncompleteError: If some parts failed for good; those that did not are recorded.
        """
        found = {part.number: value for part, value in self.do(name, work, parts, folder)}
        return [found[part.number] for part in parts]


@dataclass(frozen=True)
class Exchange:
    """A folder through which the workers of several steps give each other files.

    Attributes:
        steps: How the parts are done.
        folder: The folder.
        is_recorded: Whether results of parts are recorded in it.
    """

    steps: Steps
    folder: Location
    is_recorded: bool

    def results(self, name: str, work: StepWork, parts: Sequence[Part]) -> list[Any]:
        """Do a step as `Steps.results` does, with a folder for its results."""
        record = self.folder / name.replace(" ", "-") if self.is_recorded else None
        return self.steps.results(name, work, parts, record)


@contextmanager
def exchange(steps: Steps, place: Location, name: str, *, is_small: bool) -> Iterator[Exchange]:
    """Make a folder for several steps, for a `with` block; it is removed if the block succeeds.

    Args:
        steps: How the parts are done.
        place: Where it lies.
        name: Its name, which must stand for all that the results depend on.
        is_small: Whether each step has one part at most, which this process does: then the folder
            is a temporary one on this machine, and nothing is recorded.
    """
    if is_small:
        with tempfile.TemporaryDirectory(prefix="kalm-steps-") as temporary:
            yield Exchange(steps, Location(temporary), is_recorded=False)
        return
    yield Exchange(steps, place / name, is_recorded=True)
    remove_step(place, name)


def _recorded(session: LanceFileSession) -> dict[int, Any]:
    """Return the results in a folder by the number of their part."""
    names = [path for path in session.list() if path.endswith(".json") and "/" not in path]
    return {int(path.removesuffix(".json")): json.loads(read_text(session, path)) for path in names}


def remove_step(table: Location, folder: str) -> None:
    """Remove the files of a step; `folder` is below the table's.

    Results go first, so that none is found later without the files that it names.
    """
    session = table.file_session()
    for path in sorted(session.list(folder), key=is_data):
        session.delete_file(path)
