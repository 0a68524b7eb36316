"""Finishes a table once all shards are in it: repeated ids, compaction, indexes.

Every step does nothing if its work is done already, so an interrupted run is simply started again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import lance
import numpy as np
from lance.dataset import LanceOperation
from lance.optimize import CompactionOptions

from kalm_encoder.errors import InputError
from kalm_encoder.table.location import Location
from kalm_encoder.table.spec import TableSpec
from pipeline.table.claim import CHANGING, COMPLETE, LOADING, SEALED, STATE, TableClaim
from pipeline.table.compaction import rewrite
from pipeline.table.deletions import marks_of_deletion
from pipeline.table.duplicates import find_repeated
from pipeline.table.fragments import fragments_key, open_to_write
from pipeline.table.indexes import BTREE, INVERTED, LABEL_LIST, bring_up_to_date
from pipeline.table.ledger import ON_DUPLICATE, PLAN
from pipeline.table.merging import merge_rows
from pipeline.table.side_files import FINISH
from pipeline.table.steps import Steps, remove_step

logger = logging.getLogger(__name__)

ROWS = "kalm.rows"
"""Number of rows when the table was finished last; `kalm verify` compares it."""
CHANGE, OF_ROWS, OF_FILES = "kalm.change", "rows", "files"
"""What a change that is under way may change: the rows, or only in which files they are."""
INDEX_COLUMNS = "kalm.index_columns"
"""Metadata columns that are indexed, with commas."""
FRAGMENT_BYTES = 2 << 30
"""Size of a fragment that compaction aims at."""
FRAGMENT_ROWS = 1 << 20
"""Most rows of a fragment that compaction makes, if the rows are small."""
LARGE_FRAGMENT_BYTES = 128 << 20
"""A freshly encoded table whose mean fragment is at least this large is not compacted."""
DELETE_AT_ONCE = 10_000
"""Most rows that one commit deletes; each is named in its predicate."""
COMPACT_AT_ONCE = 10_000
"""Most fragments that are compacted together; each takes about 8 kB of memory."""


def check_index_columns(columns: Sequence[str], spec: TableSpec) -> None:
    """Refuse to index what is no metadata column of a table.

    Raises:
        InputError: If one of the columns is none; the message lists those that are.
    """
    names = [name for name, _ in spec.metadata_columns]
    if lacking := [column for column in columns if column not in names]:
        raise InputError(
            f"there is no metadata column {lacking[0]!r} to index; the table keeps "
            f"{', '.join(names) or 'none (--keep keeps fields of the corpus)'}"
        )


def indexed_columns(metadata: dict[str, str]) -> list[str]:
    """Return the metadata columns that a table indexes, from the metadata of its schema."""
    return [name for name in metadata.get(INDEX_COLUMNS, "").split(",") if name]


def compaction_options(rows_per_fragment: int, excluded: list[int]) -> CompactionOptions:
    """Return the options of a compaction that leaves some fragments as they are."""
    return {
        "target_rows_per_fragment": rows_per_fragment,
        "batch_size": 1024,
        "excluded_fragment_ids": excluded,
    }


def finish_folder(table: Location, dataset: lance.LanceDataset) -> Location:
    """Return the folder of what the workers exchange while this version is finished."""
    return table / f"{FINISH}/{fragments_key(dataset)}"


class SealedTable(TableClaim):
    """The claim to a table after all its shards were added.

    Attributes:
        spec: What the table records about its model and settings.
    """

    def __init__(self, location: Location) -> None:
        super().__init__(location)
        self.spec = TableSpec.from_metadata(self.dataset.schema.metadata, location.uri)
        if self.state == LOADING:
            raise self._incomplete()

    def finish(
        self,
        steps: Steps,
        *,
        compact: bool = True,
        index_columns: Sequence[str] = (),
        record: dict[str, str] | None = None,
    ) -> None:
        """Bring the table to COMPLETE: drop repeated ids, compact, index.

        Args:
            steps: How the steps are done.
            compact: Whether small fragments are merged.
            index_columns: Metadata columns to index, beside those that are indexed already.
            record: Schema metadata to write in the same commit that makes it complete.

        Raises:
            InputError: If the table is complete, and lacks one of these indexes.
            FencedError: If another process claimed the table.
        """
        if self.state == COMPLETE:
            if lacking := self.without_index(index_columns):
                raise InputError(
                    f"{self.location} is complete without an index of {', '.join(lacking)}: "
                    "`kalm sync` with the same --index-column adds it"
                )
            return
        self.take_over()
        if indexed := sorted({*indexed_columns(self.metadata), *index_columns}):
            self.change({INDEX_COLUMNS: ",".join(indexed)})
        if self.state == SEALED and (keep := self.metadata[ON_DUPLICATE]) != "error":
            self.retry(lambda: self._drop_repeated(steps, keep))
        if compact:
            self.retry(lambda: self._compact(steps))
        self.retry(lambda: self._index(steps))
        rows = str(self.dataset.count_rows())
        self.change({**(record or {}), STATE: COMPLETE, ROWS: rows})
        remove_step(self.location, FINISH)

    def begin_change(self, *, rows: bool = True) -> None:
        """Claim the table to change it, or to finish a change that was interrupted.

        Args:
            rows: Whether the table will hold other rows than those that `kalm encode` planned.

        Raises:
            InputError: If the table is not complete.
            FencedError: If the table changed since this process read it.
        """
        if self.state not in (COMPLETE, CHANGING):
            raise self._incomplete()
        if not rows and self.state == CHANGING and self.metadata.get(CHANGE) != OF_FILES:
            raise InputError(f"a change of {self.location} was interrupted: run it again first")
        # The caller chose what to change by reading this version. For another it must choose anew.
        what = {PLAN: "changed", CHANGE: OF_ROWS} if rows else {CHANGE: OF_FILES}
        self.take_over({STATE: CHANGING, **what}, unchanged=True)

    def merge(self, steps: Steps, staged: Sequence[Location]) -> None:
        """Replace rows by id and add new ones in one commit; run it again after any failure.

        See `merging.merge_rows`.
        """
        operation = merge_rows(steps, self.location, self.dataset, staged)
        self.refresh(self.commit_operation(operation))

    def delete(self, row_ids: Sequence[int]) -> None:
        """Delete rows by stable row id. Rows that are gone already are no error."""
        for start in range(0, len(row_ids), DELETE_AT_ONCE):
            # Row ids are integers: nothing that a user wrote is in this predicate.
            some = ",".join(map(str, row_ids[start : start + DELETE_AT_ONCE]))
            self.dataset.delete(f"_rowid IN ({some})", conflict_retries=0)
            self.refresh(self.dataset)

    def delete_rows(
        self, steps: Steps, files: Sequence[Location], groups: Sequence[int], what: str
    ) -> None:
        """Delete rows by their addresses in one commit; see `marks_of_deletion`.

        The addresses hold as long as no fragment is rewritten.
        """
        marks = marks_of_deletion(steps, self.location, self.dataset, files, groups, what)
        self.refresh(self.commit_operation(LanceOperation.Delete(*marks, what)))

    def purge(self, steps: Steps) -> None:
        """Rewrite the fragments with deleted rows, and drop the indexes, which hold their values.

        `finish` makes the indexes anew.
        """
        fragments = self.dataset.get_fragments()
        whole = [f.fragment_id for f in fragments if not f.num_deletions]
        options = compaction_options(self._rows_per_fragment(), whole)
        rewrite(self, steps, {**options, "materialize_deletions_threshold": 0.0})
        for index in self.dataset.describe_indices():
            self.dataset.drop_index(index.name)
        self.refresh(open_to_write(self.location))

    def _drop_repeated(self, steps: Steps, keep: str) -> None:
        folder = finish_folder(self.location, self.dataset)
        repeated = find_repeated(steps, self.location, self.dataset, keep, folder)
        if repeated.count:
            self.delete_rows(steps, repeated.files, repeated.groups, "repeated rows")

    def _compact(self, steps: Steps) -> None:
        """Merge small fragments into ones of about FRAGMENT_BYTES.

        Large fragments that were just encoded stay as they are. Rewriting them would double the
        table on disk for a while, and rows at random lie in as many files either way.
        """
        fragments = self.dataset.get_fragments()
        size = self._bytes()
        if self.state == SEALED and size >= LARGE_FRAGMENT_BYTES * max(1, len(fragments)):
            logger.info("%s: the fragments are large, none is merged", self.location)
            return
        # Groups of equal size: a last group of a few fragments, with nothing to merge, would stay
        # in front of the fragments that the others became, and rows would leave their order.
        target = self._rows_per_fragment()
        rounds = -(-len(fragments) // COMPACT_AT_ONCE)
        for group in np.array_split([f.fragment_id for f in fragments], rounds) if rounds else []:
            others = {f.fragment_id for f in self.dataset.get_fragments()} - set(group.tolist())
            rewrite(self, steps, compaction_options(target, sorted(others)))

    def _rows_per_fragment(self) -> int:
        """Return how many rows of this table make a fragment of about FRAGMENT_BYTES."""
        rows = max(1, int(self.dataset.count_rows()))
        return min(FRAGMENT_ROWS, max(1, FRAGMENT_BYTES * rows // max(1, self._bytes())))

    def _bytes(self) -> int:
        """Return the bytes of all data files."""
        files = (file for f in self.dataset.get_fragments() for file in f.metadata.files)
        return sum(int(file.file_size_bytes or 0) for file in files)

    def without_index(self, columns: Sequence[str]) -> list[str]:
        """Return those of the columns that are not indexed, if there are rows to index."""
        indexed = {name for index in self.dataset.describe_indices() for name in index.field_names}
        return [c for c in columns if c not in indexed] if self.dataset.count_rows() else []

    def _index(self, steps: Steps) -> None:
        """Index text, ids and metadata, if there are rows."""
        if self.dataset.count_rows():
            kinds = {"text": INVERTED} if self.spec.keep_text else {}  # the longest first
            kinds["id"] = BTREE
            types = dict(self.spec.metadata_columns)
            for name in indexed_columns(self.metadata):
                kinds[name] = LABEL_LIST if types[name] == "list<string>" else BTREE
            bring_up_to_date(self, steps, kinds)

    def _incomplete(self) -> InputError:
        return InputError(f"{self.location} is not complete yet: run its `kalm encode` again first")
