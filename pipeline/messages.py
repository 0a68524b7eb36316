"""Defines the values that driver and executors exchange: what a worker gets and gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from kalm_encoder.table.location import Location
from pipeline.corpus.passages import Reject
from pipeline.corpus.shards import Shard
from pipeline.logs import LogOptions, current

STEP_IN_FLIGHT = 2
"""Units per worker at once of a work without a model: one is read while the other is worked on."""
IN_FLIGHT = 3
"""Least shards per worker at once: one is read or tokenised, one is on the device, one is written.
A CPU worker has no more, because its forwards take nearly all of its time."""


def shards_in_flight(cpus: int, *, on_gpu: bool) -> int:
    """Return how many shards a worker has at once.

    A GPU encodes a shard in a fraction of the time that it takes to read, tokenise and write it, so
    each CPU beside it has a shard of its own.
    """
    return max(IN_FLIGHT, cpus) if on_gpu else IN_FLIGHT


class Unit(Protocol):
    """A part of some work that one worker does at a time; a shard is one."""

    @property
    def number(self) -> int:
        """Position among the units of the work, from 0."""

    @property
    def id(self) -> str:
        """Its name in log lines and messages."""

    @property
    def path(self) -> str:
        """What units have in common that one worker should do; "" if nothing."""

    @property
    def size(self) -> int:
        """How much there is to do, in `measure`."""

    @property
    def measure(self) -> str:
        """The measure of `size`: only sizes in the same measure can be compared."""

    @property
    def is_packed(self) -> bool:
        """Whether units of the same path are cheap only in their order."""


@dataclass(frozen=True, slots=True)
class Part:
    """A unit of a step that touches all rows of a table or a corpus.

    Attributes:
        number: Position among the parts of the step, from 0.
        what: What the step is to do here; it says what that means.
        size: How much that is, such as rows or bytes.
    """

    number: int
    what: Any
    size: int = 1

    @property
    def id(self) -> str:
        """Its name in log lines and messages."""
        return f"part-{self.number:06d}"

    @property
    def path(self) -> str:
        """No two parts belong together."""
        return ""

    @property
    def measure(self) -> str:
        """All parts of a step have one measure."""
        return ""

    @property
    def is_packed(self) -> bool:
        """Parts may be done in any order."""
        return False


@dataclass(frozen=True)
class Place:
    """What a worker may use of its node.

    Attributes:
        cpus: Number of CPUs. None leaves the choice to the libraries.
        gpu: Share of a GPU; 0 for none. None takes the first GPU, if there is one.
    """

    cpus: int | None = None
    gpu: float | None = None


ANYWHERE = Place()
"""A place where the libraries choose."""


class Task(ABC):
    """Work that is loaded in the process of a worker. Several threads may call `do`."""

    @abstractmethod
    def do(self, unit: Any) -> Any:
        """Do one unit and return its result, which names the unit and travels to the driver."""

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU, so that the CPUs only have to keep up."""
        return False

    def stop(self) -> None:  # noqa: B027 - most tasks have nothing to stop
        """Let the units under way fail soon; no more can be done."""

    def device_is_lost(self) -> bool:
        """Return whether every other unit would fail too, as on a GPU after some errors."""
        return False


@dataclass(frozen=True, kw_only=True)
class Work(ABC):
    """Something to do on workers, unit by unit. It travels to each of them.

    Attributes:
        table: Address of the table. Its storage options serve for the inputs too; they are passed
            in memory and never written.
        logs: How a worker logs, and the id of the run.
        is_large: Whether even one unit goes to a worker, if there are any, because it takes more
            memory than a driver should.
        loads_model: Whether a worker loads a model, so that it wants a GPU if there is one.
    """

    table: Location
    logs: LogOptions = field(default_factory=current)
    is_large: bool = False
    loads_model: ClassVar[bool] = False

    @abstractmethod
    def start(self, place: Place) -> Task:
        """Load in this process what all units need.

        Raises:
            KalmError: If that cannot be loaded; this ends the run.
        """


@dataclass(frozen=True)
class ShardResult:
    """A shard that was written but not committed.

    Attributes:
        shard: The shard.
        fragment: Lance fragment metadata as JSON; None if every row was rejected.
        num_rows: Number of rows written.
        rejects: Rows that were not written.
        num_tokens: Number of real tokens encoded.
        padded_tokens: Number of tokens the encoder computed, padding included.
        num_truncated: Number of passages cut to max_length.
        seconds: Seconds by stage. read, tokenise, queued (the wait for a busy device), forward,
            pool and write add up to the time of the shard; idle is the time for which the device
            waited for this shard.
        worker: Host and process that encoded it; "" if nobody did.
        compute_dtype: Dtype in which the encoder computed; None if nothing was computed.
        began: When the worker began it, in seconds of Unix time; None if nobody noted it.
    """

    shard: Shard
    fragment: str | None
    num_rows: int
    rejects: tuple[Reject, ...] = ()
    num_tokens: int = 0
    padded_tokens: int = 0
    num_truncated: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    worker: str = ""
    compute_dtype: str | None = None
    began: float | None = None


@dataclass(frozen=True)
class Failure:
    """A unit that was given up after some attempts, with the last reason."""

    unit: Unit
    attempts: int
    reason: str


Outcome = Any
"""What an executor yields: the result of a unit as `Task.do` returned it; a Failure; or None, which
says that nothing was ready for a while."""

Executor = Callable[[Work, Sequence[Unit]], Generator[Outcome]]
"""Does units of a work and yields their outcomes in any order."""
