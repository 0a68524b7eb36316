"""What happens to a table once every shard is in it: duplicates, compaction, indexes, tags.

Every step does nothing where its work is done, so that an interrupted one is simply run again.
Readers follow the tag `live`, which moves last; `previous` names what it pointed at before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import pyarrow as pa

from kalm_encoder.errors import InputError, MissingIdsError, first_line
from kalm_encoder.table.location import Location
from kalm_encoder.table.reader import LIVE_TAG, ids_in
from kalm_encoder.table.spec import TableSpec
from pipeline.table.claim import CHANGING, COMPLETE, LOADING, SEALED, STATE, TableClaim
from pipeline.table.duplicates import repeated_rows
from pipeline.table.ledger import ON_DUPLICATE, PLAN

logger = logging.getLogger(__name__)

PREVIOUS_TAG = "previous"
ROWS = "kalm.rows"
"""Rows the table had when it was finished last; verify compares."""
FRAGMENT_BYTES = 2 << 30
LARGE_FRAGMENT_BYTES = 128 << 20
"""Of the mean fragment: a freshly encoded table of such ones is left as it is."""
DELETE_AT_ONCE = 10_000
COMPACT_AT_ONCE = 10_000
"""Fragments, each about 8 kB of memory."""
Item = TypeVar("Item")


class SealedTable(TableClaim):
    """The write side of a table that is sealed."""

    def __init__(self, location: Location) -> None:
        super().__init__(location)
        self.spec = TableSpec.from_metadata(self.dataset.schema.metadata, location.uri)
        if self.state == LOADING:
            raise InputError(f"{location} is not complete yet: run its `kalm encode` again first")

    def finish(self, *, compact: bool = True) -> None:
        """Bring a sealed table to COMPLETE: duplicates, compaction, indexes.

        Raises:
            FencedError: another process took the table over.
        """
        if self.state == COMPLETE:
            return
        if not self.is_mine:
            self.take_over()
        if self.state == SEALED:
            policy = self.metadata[ON_DUPLICATE]
            if policy != "error":
                self.retry(lambda: self._drop_repeated(policy))
        if compact:
            self.retry(self._compact)
        self.retry(self._index)
        self.change({STATE: COMPLETE, ROWS: str(self.dataset.count_rows())})

    def begin_change(self, *, rows: bool = True) -> None:
        """Take the table to change it, or to finish a change that was interrupted.

        Args:
            rows: whether its rows will no longer be those that `kalm encode` planned.

        Raises:
            InputError: the table's encoding is not finished.
            FencedError: the table changed since this process read it.
        """
        if self.state not in (COMPLETE, CHANGING):
            raise InputError(f"{self.location} is not complete yet: run its `kalm encode` again")
        if not rows and self.state == CHANGING:
            raise InputError(f"a change of {self.location} was interrupted: run it again first")
        # What is to change was chosen by reading this version: another one needs another look.
        self.take_over({STATE: CHANGING, **({PLAN: "changed"} if rows else {})}, unchanged=True)

    def upsert(self, rows: pa.RecordBatchReader) -> None:
        """Replace rows by id and add new ones, in one commit; run it again after any failure."""
        builder = self.dataset.merge_insert("id").when_matched_update_all()
        builder.when_not_matched_insert_all().conflict_retries(0).execute(rows)
        self.refresh(self.dataset)

    def delete(self, row_ids: Sequence[int]) -> None:
        """Delete rows by stable row id; those that are gone already are no error."""
        for some in _pieces(row_ids):
            # Row ids are integers: nothing of a user's is in this predicate.
            predicate = f"_rowid IN ({','.join(map(str, some))})"
            self.dataset.delete(predicate, conflict_retries=0)
            self.refresh(self.dataset)

    def _drop_repeated(self, keep: str) -> None:
        for rows in list(repeated_rows(self.dataset, keep)):
            self.delete(rows.tolist())

    def _compact(self) -> None:
        """Merge small fragments into ones of about FRAGMENT_BYTES.

        What was just encoded in large ones stays: rewriting all of it would double the table for
        a while, and rows at random lie in as many files either way.
        """
        fragments = [f.metadata for f in self.dataset.get_fragments()]
        size = sum(file.file_size_bytes or 0 for f in fragments for file in f.files)
        if self.state == SEALED and size >= LARGE_FRAGMENT_BYTES * max(1, len(fragments)):
            logger.info("%s: fragments are large, none is merged", self.location)
            return
        rows = max(1, self.dataset.count_rows())
        target = min(1 << 20, max(1, FRAGMENT_BYTES * rows // max(1, size)))
        ids = [f.id for f in fragments]
        rounds = max(1, -(-len(ids) // COMPACT_AT_ONCE))
        # Of equal size: one that has nothing to merge would stay in front of those made anew.
        for some in _pieces(ids, max(1, -(-len(ids) // rounds))):
            others = {f.fragment_id for f in self.dataset.get_fragments()} - set(some)
            self.dataset.optimize.compact_files(
                target_rows_per_fragment=target,
                batch_size=1024,
                excluded_fragment_ids=sorted(others),
            )
            self.refresh(self.dataset)

    def _index(self) -> None:
        """Index ids and text, where there are rows; add to the indexes what they do not cover."""
        columns = {c for index in self.dataset.describe_indices() for c in index.field_names}
        if self.dataset.count_rows():
            if "id" not in columns:
                self.dataset.create_scalar_index("id", "BTREE")
            if self.spec.keep_text and "text" not in columns:
                self.dataset.create_scalar_index("text", "INVERTED", with_position=False)
            if columns:
                self.dataset.optimize.optimize_indices()
        self.refresh(self.open())


def publish(location: Location, version: int | None = None) -> int:
    """Point `live` at a complete version (the latest), and `previous` at what `live` was.

    Returns:
        The version that is live now.

    Raises:
        InputError: no such version, or one that is not complete.
    """
    dataset = location.dataset()
    try:
        at = dataset if version is None else dataset.checkout_version(version)
    except (ValueError, OSError) as error:
        raise InputError(f"{location} has no version {version}: {first_line(error)}") from error
    state = (at.schema.metadata or {}).get(STATE.encode(), b"?").decode()
    if state != COMPLETE:
        raise InputError(
            f"version {at.version} of {location} is {state}, only a complete one can be "
            "live: run the command that makes it again"
        )
    tags = dataset.tags.list()
    live = tags[LIVE_TAG]["version"] if LIVE_TAG in tags else None
    if live != at.version:
        if live is not None:
            _tag(dataset, PREVIOUS_TAG, live)
        _tag(dataset, LIVE_TAG, at.version)
    return int(at.version)


def rollback(location: Location) -> int:
    """Swap `live` and `previous`. Returns the version that is live now.

    Raises:
        InputError: nothing was published before.
    """
    tags = location.dataset().tags.list()
    if PREVIOUS_TAG not in tags:
        raise InputError(f"{location} has no earlier published version to go back to")
    return publish(location, int(tags[PREVIOUS_TAG]["version"]))


def delete(location: Location, ids: Sequence[str]) -> int:
    """Delete passages by id and publish the table without them. Returns how many went.

    Raises:
        MissingIdsError: some ids are not in the table; nothing is deleted.
    """
    writer = SealedTable(location)
    unique = list(dict.fromkeys(ids))
    found: dict[str, int] = {}
    for some in _pieces(unique):
        scanner = writer.dataset.scanner(columns=["id"], filter=ids_in(some), with_row_id=True)
        rows = scanner.to_table()
        found |= zip(rows["id"].to_pylist(), rows["_rowid"].to_pylist(), strict=True)
    missing = [i for i in unique if i not in found]
    if missing and writer.state == COMPLETE:  # not a run that goes on where one was interrupted
        raise MissingIdsError(missing, location.uri)
    writer.begin_change()
    writer.retry(lambda: writer.delete(list(found.values())))
    writer.finish(compact=False)
    publish(location)
    return len(found)


def compact(location: Location) -> None:
    """Merge small data files, bring the indexes up to date, and publish."""
    writer = SealedTable(location)
    writer.begin_change(rows=False)
    writer.finish()
    publish(location)


def _pieces(values: Sequence[Item], size: int = DELETE_AT_ONCE) -> Iterator[Sequence[Item]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _tag(dataset: Any, name: str, version: int) -> None:
    if name in dataset.tags.list():
        dataset.tags.update(name, version)
    else:
        dataset.tags.create(name, version)
