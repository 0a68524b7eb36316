"""What was seen of a corpus, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.passages import Passage

TEXT, COLUMNS, ORDERED = "plain text", "Parquet and Lance", "compressed or quoted"


@dataclass(frozen=True)
class Block:
    """What one run of records holds.

    Attributes:
        file: number of its file.
        start: where it begins in the file; blocks sort by both.
        size: bytes (compressed ones of a compressed file) or rows, the unit of its stratum.
        lines: lines or rows, blank ones included.
        rejected: records that are no passage.
        lengths: (passages,) int64 tokens of each rendered passage, not cut.
    """

    file: int
    start: int
    size: float
    lines: int
    rejected: int
    lengths: NDArray[np.int64]


@dataclass
class Stratum:
    """Files that are sampled in one way.

    Attributes:
        kind: TEXT, COLUMNS or ORDERED.
        size: of all of it, in bytes or rows.
        lines: of all of it, where they were counted.
        complete: whether every block was read.
    """

    kind: str
    size: float
    lines: int | None = None
    blocks: list[Block] = field(default_factory=list)
    complete: bool = False


@dataclass
class Sample:
    """What was seen of a corpus.

    Attributes:
        num_files: of the corpus.
        strata: one a kind of files there is.
        examples: some passages and their tokens, for what needs texts.
        seconds: it took.
        notes: what a reader must know of how it was drawn.
    """

    num_files: int
    strata: list[Stratum] = field(default_factory=list)
    examples: list[tuple[Passage, int]] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether all of the corpus was read."""
        return all(stratum.complete for stratum in self.strata)

    @property
    def blocks(self) -> list[Block]:
        """All blocks in the order of the corpus."""
        blocks = [block for stratum in self.strata for block in stratum.blocks]
        return sorted(blocks, key=lambda b: (b.file, b.start))
