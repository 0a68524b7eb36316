"""What a comparison finds, partition by partition: counts for the driver, the rest in files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kalm_encoder.table.location import Location
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.passages import Reject
from pipeline.messages import Place
from pipeline.table.deletions import write_addresses
from pipeline.table.partitions import new_name, read_partition, write_groups
from pipeline.table.rejects import read_lines
from pipeline.table.steps import DoPart, StepWork
from pipeline.upkeep.comparison.corpus import SHARD_BITS
from pipeline.upkeep.comparison.join import DIGESTS, PLACE, ROW, SHOWN, join
from pipeline.upkeep.comparison.sides import side_schema

ENCODE = -1
"""Stands for the row in the table of a passage that has to be encoded."""


@dataclass
class Groups:
    """Rows in files, each of which has them by group; see `write_groups`.

    Attributes:
        counts: (groups,) number of rows of each group.
        files: The files.
    """

    counts: NDArray[np.int64]
    files: list[Location] = field(default_factory=list)

    @classmethod
    def none(cls, groups: int) -> Groups:
        """Return so many empty groups."""
        return cls(np.zeros(groups, np.int64))

    @property
    def numbers(self) -> list[int]:
        """Numbers of the groups that hold any."""
        numbers: list[int] = np.flatnonzero(self.counts).tolist()
        return numbers

    def add(self, counts: list[int], file: Location) -> None:
        """Add the rows of a file, unless it has none."""
        if any(counts):
            self.counts += np.array(counts)
            self.files.append(file)


@dataclass
class Changes:
    """The differences between a corpus and a table.

    Attributes:
        folder: Where the files lie that name them.
        to_encode: Places of the passages that are changed or new, by piece of the corpus.
        to_update: Places of those whose metadata changed, by piece of the corpus.
        missing_rows: Addresses of the missing rows, by group of fragments.
        surplus_rows: Addresses of the surplus rows, by group of fragments.
        reject_files: Files of the rows of the corpus that cannot be used, in its order.
        unchanged: Number of passages whose text and metadata are those that the table holds.
        changed: Number of passages whose text differs from it.
        metadata_changed: Number of passages with the same text and other metadata. A passage of a
            split document that has another number now counts here too.
        new: Number of passages that the table does not hold.
        missing: Number of rows whose passage is not in the corpus.
        surplus: Number of rows of documents in the corpus that have fewer passages now; they are
            not among the missing.
        rejected: Number of rows of the corpus that cannot be used.
        repeated: Number of passages that do not count, as another has their id.
        shown: The first SHOWN places of these.
        encode_digest: Hash over the passages that are changed or new, and their metadata.
        update_digest: Hash over those whose metadata changed.
    """

    folder: Location
    to_encode: Groups
    to_update: Groups
    missing_rows: Groups
    surplus_rows: Groups
    reject_files: list[str]
    unchanged: int = 0
    changed: int = 0
    metadata_changed: int = 0
    new: int = 0
    missing: int = 0
    surplus: int = 0
    rejected: int = 0
    repeated: int = 0
    shown: list[int] = field(default_factory=list)
    encode_digest: int = 0
    update_digest: int = 0

    @property
    def name(self) -> str:
        """Name of the comparison, which is that of its folder."""
        return self.folder.uri.rsplit("/", 1)[-1]

    @property
    def digest(self) -> str:
        """Name of what is to be encoded."""
        return f"{self.encode_digest:032x}"

    def counts(self) -> dict[str, int]:
        """Return the number of passages or rows of each kind."""
        return {
            "unchanged": self.unchanged,
            "changed": self.changed,
            "metadata_changed": self.metadata_changed,
            "new": self.new,
            "missing": self.missing,
            "surplus": self.surplus,
            "rejected": self.rejected,
        }

    def rejects(self) -> Iterator[Reject]:
        """Yield the rows of the corpus that cannot be used, in its order."""
        session = self.folder.file_session()
        for name in self.reject_files:
            yield from read_lines(session, name)

    def add(self, found: dict[str, Any]) -> None:
        """Add what the join of a partition found, the result of a part of JoinWork."""
        self.unchanged += found["unchanged"]
        self.new += found["new"]
        self.changed += sum(found["to_encode"]) - found["new"]
        self.metadata_changed += sum(found["to_update"])
        self.missing += sum(found["missing"])
        self.surplus += sum(found["surplus"])
        changes = self.folder / found["changes"]
        self.to_encode.add(found["to_encode"], changes)
        self.to_update.add(found["to_update"], changes)
        self.missing_rows.add(found["missing"], self.folder / found["missing_file"])
        self.surplus_rows.add(found["surplus"], self.folder / found["surplus_file"])
        self.repeated += found["repeated"]
        self.shown = sorted(self.shown + found["shown"])[:SHOWN]
        encode, update = found["digests"]
        self.encode_digest = (self.encode_digest + encode) % DIGESTS
        self.update_digest = (self.update_digest + update) % DIGESTS


@dataclass(frozen=True, kw_only=True)
class JoinWork(StepWork):
    """Partitions of both sides to join.

    Attributes:
        spec: Spec of the table.
        folder: Where the files of both sides are, and those of the outcome go.
        corpus_files: Names of the files of the corpus.
        table_files: Names of the files of the table.
        starts: (pieces,) the first shard of each piece of the corpus.
        group_starts: (groups,) the first fragment id of each group of fragments.
        keep: Which passage of a repeated id counts: "first" or "last".
    """

    spec: TableSpec
    folder: Location
    corpus_files: tuple[str, ...]
    table_files: tuple[str, ...]
    starts: NDArray[np.int64]
    group_starts: NDArray[np.int64]
    keep: str

    def load(self, place: Place) -> DoPart:
        """Load nothing. A part is the number of a partition; `Changes.add` takes its result."""
        spec, folder = self.spec, self.folder
        corpus_files = [folder / name for name in self.corpus_files]
        table_files = [folder / name for name in self.table_files]

        def do(number: int) -> dict[str, Any]:
            passages = [side_schema(spec, of_corpus=True).empty_table()]
            passages += read_partition(corpus_files, number)
            held = [side_schema(spec, of_corpus=False).empty_table()]
            held += read_partition(table_files, number)
            rows = pa.concat_tables(held)
            found = join(pa.concat_tables(passages), rows, self.keep)
            places = np.concatenate([found.to_encode, found.to_update])
            pieces = np.searchsorted(self.starts, places >> SHARD_BITS, side="right") - 1
            name, num_pieces = new_name(), len(self.starts)
            of_encode, of_update = np.split(pieces, [len(found.to_encode)])
            sources = np.concatenate([np.full(len(found.to_encode), ENCODE), found.held_as])
            if len(places):
                changes = pa.table({PLACE: places, ROW: sources})
                write_groups(changes, pieces, num_pieces, folder / name)
            result = {
                "unchanged": found.unchanged,
                "new": found.num_new,
                "to_encode": np.bincount(of_encode, minlength=num_pieces).tolist(),
                "to_update": np.bincount(of_update, minlength=num_pieces).tolist(),
                "changes": name,
                "repeated": found.num_repeated,
                "shown": found.repeated.tolist(),
                "digests": [found.encode_digest, found.update_digest],
            }
            for kind, chosen in (("missing", found.missing), ("surplus", found.surplus)):
                addresses = rows[ROW].to_numpy()[chosen]
                name, starts = new_name(), self.group_starts.tolist()
                groups = write_addresses(addresses.astype(np.uint64), starts, folder / name)
                result[kind] = np.bincount(groups, minlength=len(starts)).tolist()
                result[f"{kind}_file"] = name
            return result

        return do
