"""A corpus, or what changed in it, as the workers of a sync read it: in pieces of some shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kalm_encoder.model import checkpoint
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.erased import NONE_ERASED, ErasedIds
from pipeline.corpus.shards import Shard, ShardReader, ShardRows
from pipeline.corpus.splitting import Splitter
from pipeline.messages import Part

SHARD_BITS = 40
"""A place is a shard's number, shifted by so many bits, and a number in that shard."""
PIECE_ROWS = 200_000
"""Rows of a piece, if that makes no more than MOST_PIECES."""
MOST_PIECES = 512
"""Most pieces of a corpus or a table, since each join opens a file of each."""
Places = NDArray[np.int64]


class Piece(NamedTuple):
    """Shards that one worker reads.

    Attributes:
        number: Position among the pieces of the corpus, from 0.
        shards: Some shards, in their order.
        lines: (n,) places of the rows in them that count, with their lines, ascending. None takes
            all rows.
    """

    number: int
    shards: Sequence[Shard]
    lines: Places | None = None


@dataclass(frozen=True)
class Reading:
    """How a corpus is read to compare it with a table.

    Attributes:
        spec: Spec of the table, which says whether documents are split and metadata are kept.
        model: Model by whose tokens documents are split.
        revision: Its revision.
        erased: Ids whose passages count as rejected.
        options: Storage options of the files.
    """

    spec: TableSpec
    model: str
    revision: str | None = None
    erased: ErasedIds = NONE_ERASED
    options: dict[str, str] | None = None

    def open(self) -> Read:
        """Load what splits documents, and return what reads pieces; several threads may call it."""
        split: Splitter | None = None
        if self.spec.split:
            files = checkpoint.resolve(self.model, self.revision)
            split = Splitter.of(self.spec, files.tokenizer())

        def read(piece: Piece, numbers: Collection[int] | None = None) -> Iterator[OfShard]:
            reader = ShardReader(self.options, self.erased)
            for shard in piece.shards:
                if numbers is not None and shard.number not in numbers:
                    continue
                rows = reader.read(shard)
                if piece.lines is not None:
                    lines = set(_of_shard(piece.lines, shard.number).tolist())
                    some = [i for i, p in enumerate(rows.passages) if p.line in lines]
                    rejects = [reject for reject in rows.rejects if reject.line in lines]
                    rows = rows.take(some)._replace(rejects=rejects)
                yield shard, rows if split is None else split(rows, shard.path)

        return read


OfShard = tuple[Shard, ShardRows]
Read = Callable[..., Iterator[OfShard]]
"""Reads a piece, or those of its shards that have certain numbers: yields the rows of each."""


@dataclass(frozen=True)
class Corpus:
    """What a table is compared with.

    Attributes:
        reading: How it is read.
        shards: The shards to read.
        lines: As in a Piece. If it is given, only these rows are known to have changed, and what
            the table has beside them stays.
    """

    reading: Reading
    shards: Sequence[Shard]
    lines: Places | None = None

    def only(self, lines: Places) -> Corpus:
        """Return only these of its rows, and the shards that have some."""
        numbers = set(np.unique(lines >> SHARD_BITS).tolist())
        shards = [shard for shard in self.shards if shard.number in numbers]
        return Corpus(self.reading, shards, lines)

    def parts(self) -> list[Part]:
        """Return its pieces as parts of a step."""
        sizes = np.array([shard.rows.num_rows for shard in self.shards], np.int64)
        pieces = (sizes.cumsum() - sizes) // most_rows(int(sizes.sum()))
        parts = []
        for number, (_, group) in enumerate(
            groupby(zip(pieces, self.shards, strict=True), itemgetter(0))
        ):
            shards = [shard for _, shard in group]
            lines = self.lines
            if lines is not None:
                first, last = shards[0].number, shards[-1].number + 1
                bounds = np.array([first, last]) << SHARD_BITS
                lines = lines[slice(*np.searchsorted(lines, bounds))]
            parts.append(
                Part(number, Piece(number, shards, lines), sum(s.rows.num_rows for s in shards))
            )
        return parts


def places_of(shards: Sequence[Shard], rows: Iterable[tuple[str, int]]) -> Places:
    """Return the places of rows that are known by the path of their file and their line."""
    lines = defaultdict[str, list[int]](list)
    for path, line in rows:
        lines[path].append(line)
    places = [np.zeros(0, np.int64)]
    for path, group in groupby(shards, key=lambda shard: shard.path):
        of_file = list(group)
        first_lines = [shard.rows.first_line for shard in of_file]
        wanted = np.array([line for line in lines[path] if line >= first_lines[0]], np.int64)
        at = np.searchsorted(first_lines, wanted, side="right") - 1
        numbers = np.array([shard.number for shard in of_file])
        places.append(numbers[at] << SHARD_BITS | wanted)
    return np.unique(np.concatenate(places))


def most_rows(total: int) -> int:
    """Return about how many rows a piece has, of a corpus or a table with so many rows."""
    return max(PIECE_ROWS, -(-total // MOST_PIECES))


def _of_shard(places: Places, number: int) -> Places:
    """Return the numbers in a shard of those places that are in it."""
    bounds = np.array([number, number + 1]) << SHARD_BITS
    return places[slice(*np.searchsorted(places, bounds))] & ((1 << SHARD_BITS) - 1)
