"""What a verification reports: all problems are counted, and the first of them are listed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa

from kalm_encoder.errors import KalmError, first_line

SHOWN = 100
"""Most problems that a report lists, and rows that are looked up by id."""
ENGINE_ERRORS = (KalmError, OSError, ValueError, RuntimeError, pa.ArrowException)


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    Attributes:
        check: Name of the check that found it.
        detail: What is wrong.
        id: Id of the row; None if the problem concerns more than one row.
    """

    check: str
    detail: str
    id: str | None = None


@dataclass
class Report:
    """The report of a verification: what was checked and found.

    Attributes:
        uri: Address of the table.
        version: Version that was checked.
        rows: Number of rows that could be read.
        num_problems: Number of all problems.
        problems: The first SHOWN of them.
        largest_state_error: Largest relative L2 distance of stored states from newly encoded ones
            in the same store dtype; None without a sample.
        largest_score_error: Largest difference of P(yes) between the two; None without a sample.
    """

    uri: str
    version: int
    rows: int = 0
    num_problems: int = 0
    problems: list[Problem] = field(default_factory=list)
    largest_state_error: float | None = None
    largest_score_error: float | None = None

    def add(self, check: str, detail: str, id: str | None = None) -> None:
        """Count a problem, and list it if there is room."""
        self.num_problems += 1
        if len(self.problems) < SHOWN:
            self.problems.append(Problem(check, detail, id))


@contextmanager
def engine_errors_are_problems(report: Report, check: str, what: str) -> Iterator[None]:
    """Report an error of the engine in the `with` block as a problem."""
    try:
        yield
    except BaseException as error:
        # Lance panics on some damaged pages. The panic is no Exception and cannot be imported.
        if not isinstance(error, ENGINE_ERRORS) and type(error).__name__ != "PanicException":
            raise
        report.add(check, f"{what}: {first_line(error)}")
