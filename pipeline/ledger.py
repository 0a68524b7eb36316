"""Which shards are in the table: the table itself says so.

The "done" mark of a shard is the Lance commit that carries its rows. Shard k becomes the fragment
with id k + 1, and Lance refuses a commit with a fragment id that is there already, so a shard
cannot be committed twice. A driver begins by bumping an epoch in the schema metadata with a no-op
Merge; Merge conflicts with every Append made from an older version, so a driver that was taken over
is fenced off. While shards are being added nothing is deleted, compacted or indexed: a re-used
fragment id under an index gives wrong answers. The order at the end is audit, seal, index, tag.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import lance
from lance.commit import CommitConflictError
from lance.dataset import LanceOperation
from lance.schema import LanceSchema

from kalm_encoder.errors import FencedError, InputError, KalmError, MismatchError
from kalm_encoder.rows import TableSpec
from kalm_encoder.table import LIVE_TAG, first_line, open_dataset
from pipeline.fragments import with_id
from pipeline.shards import Plan

if TYPE_CHECKING:
    from pipeline.encode_shard import ShardResult

logger = logging.getLogger(__name__)

EPOCH, PLAN, NUM_SHARDS, NUM_ROWS = "kalm.epoch", "kalm.plan", "kalm.num_shards", "kalm.num_rows"
EMPTY_SHARDS, SEALED = "kalm.empty_shards", "kalm.sealed"
ATTEMPTS = 10


class Ledger:
    """The write side of one table, held by one driver.

    Attributes:
        uri: of the table.
        done: numbers of the committed shards.
        num_rows: committed rows.
        sealed: whether all shards are there and no more can be added.
        epoch: this driver's; a later driver has a higher one.
    """

    def __init__(
        self,
        uri: str,
        dataset: lance.LanceDataset,
        plan: Plan,
        storage_options: dict[str, str] | None,
    ) -> None:
        self.uri = uri
        self._plan = plan
        self._storage_options = storage_options
        self._refresh(dataset)
        self.epoch = int(self._metadata[EPOCH])

    @classmethod
    def begin(
        cls,
        uri: str,
        spec: TableSpec,
        plan: Plan,
        storage_options: dict[str, str] | None = None,
    ) -> Ledger:
        """Create the table, or take over the one that is there.

        Raises:
            MismatchError: the table was made with other settings or from other input.
            TableError: a Lance table that is none of ours.
            InputError: the place cannot be written.
        """
        if not uri.rstrip("/").endswith(".lance"):
            raise InputError(f"the table address {uri} must end in .lance (LanceDB needs it)")
        schema = spec.schema()
        facts = {
            EPOCH: "0",
            PLAN: plan.hash,
            NUM_SHARDS: str(len(plan.shards)),
            NUM_ROWS: str(plan.num_rows),
        }
        schema = schema.with_metadata({**schema.metadata, **facts})
        try:
            lance.write_dataset(
                schema.empty_table(),
                uri,
                schema=schema,
                mode="create",
                data_storage_version="2.2",
                enable_stable_row_ids=True,
                storage_options=storage_options,
            )
        except OSError as error:
            if "already exists" not in str(error):
                raise InputError(f"cannot create a table at {uri}: {first_line(error)}") from error
        dataset = open_dataset(uri, storage_options)
        _check_same(TableSpec.from_metadata(dataset.schema.metadata, uri), spec, uri)
        ledger = cls(uri, dataset, plan, storage_options)
        if ledger._metadata[PLAN] != plan.hash:
            raise MismatchError(
                "input",
                f"{uri} was begun with other input, another shard size or another limit "
                f"(plan {ledger._metadata[PLAN]}, now {plan.hash}): give the same input, or "
                "another table",
            )
        ledger._take_over()
        return ledger

    def commit(self, results: Sequence[ShardResult]) -> None:
        """Add written shards to the table in one atomic step.

        Raises:
            FencedError: another driver took over; nothing of these results was added by this one.
            OSError: the store refused, and the shards are not in the table.
        """
        for attempt in range(ATTEMPTS):
            left = [r for r in results if r.shard.number not in self.done]
            fragments = [
                with_id(r.fragment, r.shard.number + 1) for r in left if r.fragment is not None
            ]
            empty = [r.shard.number for r in left if r.fragment is None]
            try:
                if fragments:
                    self._commit(LanceOperation.Append(fragments))
                if empty:
                    known = self._empty_shards() | set(empty)
                    self._merge({EMPTY_SHARDS: ",".join(map(str, sorted(known)))})
                return
            except CommitConflictError as error:
                raise self._fenced() from error
            except OSError as error:
                # The outcome is unknown (a lost reply, a time-out): the table decides.
                logger.warning("commit failed, reading the table: %s", first_line(error))
                self._refresh(open_dataset(self.uri, self._storage_options))
                if int(self._metadata[EPOCH]) != self.epoch:
                    raise self._fenced() from error
                if attempt == ATTEMPTS - 1:
                    raise

    def seal(self) -> None:
        """Check that every shard is there once, and let no more in.

        Raises:
            KalmError: the table does not hold exactly the planned shards.
            FencedError: another driver took over.
        """
        if self.sealed:
            return
        missing = set(range(len(self._plan.shards))) - self.done
        extra = self.done - set(range(len(self._plan.shards)))
        if missing or extra:
            raise KalmError(
                f"{self.uri} cannot be sealed: shards missing {sorted(missing)[:10]}, "
                f"not planned {sorted(extra)[:10]}"
            )
        try:
            self._merge({SEALED: "1"})
        except CommitConflictError as error:
            raise self._fenced() from error

    def publish(self) -> None:
        """Index a sealed table and point the tag `live` at it; each step is skipped where done."""
        dataset = open_dataset(self.uri, self._storage_options)
        columns = {c for index in dataset.describe_indices() for c in index.field_names}
        if self.num_rows:
            if "id" not in columns:
                dataset.create_scalar_index("id", "BTREE")
            if "text" in dataset.schema.names and "text" not in columns:
                dataset.create_scalar_index("text", "INVERTED", with_position=False)
        latest = open_dataset(self.uri, self._storage_options)
        tags = latest.tags.list()
        if LIVE_TAG not in tags:
            latest.tags.create(LIVE_TAG, latest.version)
        elif tags[LIVE_TAG]["version"] != latest.version:
            latest.tags.update(LIVE_TAG, latest.version)

    def _take_over(self) -> None:
        for _ in range(ATTEMPTS):
            if self.sealed:
                return
            self.epoch = int(self._metadata[EPOCH]) + 1
            try:
                self._merge({EPOCH: str(self.epoch)})
                return
            except CommitConflictError:
                self._refresh(open_dataset(self.uri, self._storage_options))
        raise KalmError(f"{self.uri} is being written by {ATTEMPTS} other drivers: stop them")

    def _merge(self, metadata: dict[str, str]) -> None:
        """Change schema metadata in a commit that conflicts with every other one."""
        merged = self._schema.with_metadata({**self._schema.metadata, **metadata})
        self._commit(LanceOperation.Merge(self._fragments, LanceSchema.from_pyarrow(merged)))

    def _commit(self, operation: LanceOperation.BaseOperation) -> None:
        # The read version is the one this driver last made, never read again silently: it is what
        # fences a driver off.
        self._refresh(
            lance.LanceDataset.commit(
                self.uri,
                operation,
                read_version=self.version,
                storage_options=self._storage_options,
                max_retries=0,
            )
        )

    def _refresh(self, dataset: lance.LanceDataset) -> None:
        self.version = int(dataset.version)
        self._schema = dataset.schema
        self._metadata = {k.decode(): v.decode() for k, v in self._schema.metadata.items()}
        self._fragments = [f.metadata for f in dataset.get_fragments()]
        self.num_rows = sum(f.num_rows for f in self._fragments)
        self.sealed = SEALED in self._metadata
        # After sealing, compaction may renumber fragments: then every planned shard is there.
        self.done = (
            set(range(int(self._metadata[NUM_SHARDS])))
            if self.sealed
            else {f.id - 1 for f in self._fragments} | self._empty_shards()
        )

    def _empty_shards(self) -> set[int]:
        """Shards of which every row was rejected: they have no fragment to mark them."""
        return {int(n) for n in self._metadata.get(EMPTY_SHARDS, "").split(",") if n}

    def _fenced(self) -> FencedError:
        return FencedError(
            f"another `kalm encode` took {self.uri} over (this one was epoch {self.epoch}): "
            "it goes on with the work, this one stops"
        )


def _check_same(stored: TableSpec, wanted: TableSpec, uri: str) -> None:
    """Refuse to continue a table with other settings; the model's name alone may differ."""
    old, new = asdict(stored), asdict(wanted)
    for field in ("fingerprint", "ratios", "store_dtype", "max_length", "keep_text", "template"):
        if old[field] != new[field]:
            raise MismatchError(
                field,
                f"{uri} was begun with {field} {old[field]!r}, this job has {new[field]!r}: "
                "give the same setting, or another table",
            )
