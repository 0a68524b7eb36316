"""Changes of a job: tables of some hundred rows get many parts, and one part kills the job.

`python -m tests.faults.small_parts encode …` is `kalm encode …` with many parts.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs import cli
from pipeline.messages import Outcome, Part, Unit, Work
from pipeline.table.steps import Steps, StepWork

SMALL: dict[str, Any] = {
    "pipeline.run.planning.BLOCK_BYTES": 10_000,
    "pipeline.run.planning.GROUP_BYTES": 30_000,
    "pipeline.run.planning.LARGE_FILE_BYTES": 25_000,
    "pipeline.run.planning.LARGE_SHARE": 0.0,
    "pipeline.run.planning.OPEN_BYTES": 1,
    "pipeline.run.planning.SMALL_CORPUS_BYTES": 0,
    "pipeline.run.planning.in_process": None,  # so that planning has parts in one process too
    "pipeline.table.duplicates.GROUP_ROWS": 200,
    "pipeline.table.finish.FRAGMENT_ROWS": 200,
    "pipeline.table.indexes.GROUP_ROWS": 200,
    "pipeline.table.indexes.TEXT_GROUP_ROWS": 400,
    "pipeline.table.merging.COPIED_ROWS": 100,
    "pipeline.table.merging.GROUP_ROWS": 200,
    "pipeline.table.partitions.PARTITION_ROWS": 200,
    "pipeline.upkeep.comparison.corpus.PIECE_ROWS": 200,
    "pipeline.upkeep.truncate.SHARD_BYTES": 100_000,
    "pipeline.upkeep.verification.parts.PARTITION_ROWS": 200,
}
"""Constants of modules, such as sizes of parts, by which a small table becomes many parts."""

Change = Callable[[], None]
"""Changes the modules of a process that was just forked."""


def make_small() -> None:
    """Give the steps of this process small parts."""
    for name, value in SMALL.items():
        module, _, constant = name.rpartition(".")
        loaded = importlib.import_module(module)
        assert hasattr(loaded, constant), f"{name} is gone: name the constant that sizes the parts"
        setattr(loaded, constant, value)


def stop_before_finish() -> None:
    """Let an encoding end as if it was killed when all shards are committed."""
    import pipeline.run.driver as driver  # noqa: PLC0415

    driver._finish = lambda *_: os._exit(0)


def kill_at(notes: Path, number: int = -1, *, after: bool = False) -> Change:
    """Return the change that notes the step of each finished part, and kills the job at one.

    Args:
        notes: File to which the name of the step is added, one line per part.
        number: Number of the part among those of all steps of the job; -1 kills nothing.
        after: Kill when its result is recorded, not before.
    """

    def change() -> None:
        do, seen = Steps.do, 0

        def counted(
            self: Steps, name: str, work: StepWork, parts: Sequence[Part], folder: Any = None
        ) -> Iterator[tuple[Part, Any]]:
            def execute(work: Work, units: Sequence[Unit]) -> Generator[Outcome]:
                nonlocal seen
                for outcome in self.execute(work, units):
                    chosen = outcome is not None and seen == number
                    if outcome is not None:
                        seen += 1
                        with notes.open("a") as file:
                            file.write(f"{name}\n")
                    if chosen and not after:
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield outcome
                    if chosen:
                        os.kill(os.getpid(), signal.SIGKILL)

            return do(replace(self, execute=execute), name, work, parts, folder)

        Steps.do = counted  # type: ignore[method-assign]

    return change


if __name__ == "__main__":
    make_small()
    sys.argv[0] = "kalm"
    cli.main()
