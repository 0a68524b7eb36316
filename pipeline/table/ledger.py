"""Which shards are in the table: the table itself says so.

The "done" mark of a shard is the Lance commit that carries its rows. Shard k becomes the fragment
with id k + 1, and Lance refuses a commit with a fragment id that is there already, so a shard
cannot be committed twice. While shards are being added nothing is deleted, compacted or indexed: a
re-used fragment id under an index gives wrong answers. What follows the seal is in maintenance.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import lance
import pyarrow as pa
from lance.dataset import LanceOperation

from kalm_encoder.errors import InputError, KalmError, MismatchError, TableError, first_line
from kalm_encoder.table.location import Location
from kalm_encoder.table.reader import LIVE_TAG
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.shards import Plan
from pipeline.table.claim import EPOCH, LOADING, OWNER, SEALED, STATE, TableClaim
from pipeline.table.fragments import check_written, with_id

if TYPE_CHECKING:
    from pipeline.messages import ShardResult

logger = logging.getLogger(__name__)

PLAN, NUM_SHARDS, NUM_ROWS = "kalm.plan", "kalm.num_shards", "kalm.num_rows"
EMPTY_SHARDS, GENERATION = "kalm.empty_shards", "kalm.generation"
ON_DUPLICATE, REJECTED = "kalm.on_duplicate", "kalm.rejected"


class Ledger(TableClaim):
    """The write side of one table while shards are added.

    Attributes:
        done: numbers of the committed shards.
        num_rows: committed rows.
    """

    def __init__(self, location: Location, plan: Plan) -> None:
        self._plan = plan
        super().__init__(location)

    @classmethod
    def begin(
        cls,
        location: Location,
        spec: TableSpec,
        plan: Plan,
        *,
        new_generation: bool = False,
    ) -> Ledger:
        """Create the table, or take over the one that is there.

        Args:
            location: Address of the table.
            spec: what it is to record.
            plan: the shards it is to hold.
            new_generation: where the table was made from other input or with other settings, begin
                anew. Readers keep what is live until the new rows are published. A table in which
                no shard is done is begun anew in any case.

        Raises:
            MismatchError: the table was made with other settings or from other input.
            TableError: a Lance table that is none of ours.
            InputError: the place cannot be written.
        """
        if not location.uri.rstrip("/").endswith(".lance"):
            raise InputError(f"the table address {location} must end in .lance (LanceDB needs it)")
        try:
            ledger = cls(location, plan)
        except TableError:  # nothing there; a store that refuses says so again below
            create_table(location, _schema(spec, plan, 1, 0, ""))
            ledger = cls(location, plan)
        try:
            ledger._check_same(spec)
        except MismatchError:
            if not new_generation and (ledger.done or ledger.state != LOADING):
                raise
            ledger._replace(spec)
        if ledger.state == LOADING and not ledger.is_mine:
            ledger.take_over()
        return ledger

    @property
    def sealed(self) -> bool:
        """Whether all shards are there and no more can be added."""
        return self.state != LOADING

    @property
    def generation(self) -> int:
        """How many times the table was begun anew, from 1."""
        return int(self.metadata[GENERATION])

    def is_live(self) -> bool:
        """Whether readers follow a version of this generation already."""
        tags = self.dataset.tags.list()
        if LIVE_TAG not in tags:
            return False
        live = self.dataset.checkout_version(LIVE_TAG).schema.metadata or {}
        return bool(live[GENERATION.encode()].decode() == self.metadata[GENERATION])

    def commit(self, results: Sequence[ShardResult]) -> None:
        """Add written shards to the table in one atomic step.

        Raises:
            FencedError: another driver took over; nothing of these results was added by this one.
            KalmError: a data file is not what its worker wrote.
            OSError: the store refused, and the shards are not in the table.
        """
        written = {r.shard.number: r.fragment for r in results if r.fragment is not None}
        check_written(list(written.values()), self.location)
        self.retry(lambda: self._append(written))
        empty = {r.shard.number for r in results if r.fragment is None} - self.done
        if empty:
            known = sorted(self._empty_shards() | empty)
            self.change({EMPTY_SHARDS: ",".join(map(str, known))})
            self.done |= empty

    def seal(self, on_duplicate: str = "error") -> None:
        """Check that every shard is there once, and let no more in.

        Args:
            on_duplicate: recorded for maintenance, which acts on it.

        Raises:
            KalmError: the table does not hold exactly the planned shards.
            FencedError: another driver took over.
        """
        if self.sealed:
            return
        planned = set(range(len(self._plan.shards)))
        missing, extra = planned - self.done, self.done - planned
        if missing or extra:
            raise KalmError(
                f"{self.location} cannot be sealed: shards missing {sorted(missing)[:10]}, "
                f"not planned {sorted(extra)[:10]}"
            )
        rejected = self._plan.num_rows - self.num_rows
        self.change({STATE: SEALED, ON_DUPLICATE: on_duplicate, REJECTED: str(rejected)})

    def refresh(self, dataset: lance.LanceDataset) -> None:
        """Go on from this version; read from it which shards are done."""
        self.move_to(dataset)
        self.num_rows = dataset.count_rows()
        # After sealing, compaction renumbers fragments: then every planned shard is there.
        self.done = (
            set(range(int(self.metadata[NUM_SHARDS])))
            if self.metadata.get(STATE, LOADING) != LOADING
            else {f.fragment_id - 1 for f in dataset.get_fragments()} | self._empty_shards()
        )

    def _append(self, written: dict[int, str]) -> None:
        """Add the shards that are not there. Success tells what is there: it is not read again."""
        left = {number: f for number, f in written.items() if number not in self.done}
        if not left:
            return
        fragments = [with_id(fragment, number + 1) for number, fragment in left.items()]
        self.move_to(self.commit_operation(LanceOperation.Append(fragments)))
        self.done |= left.keys()
        self.num_rows += sum(f.num_rows for f in fragments)

    def _empty_shards(self) -> set[int]:
        """Shards of which every row was rejected: they have no fragment to mark them."""
        return {int(n) for n in self.metadata.get(EMPTY_SHARDS, "").split(",") if n}

    def _replace(self, spec: TableSpec) -> None:
        """Begin a new generation: no rows, fragment ids from 1 again, no index over them."""
        self.take_over()
        number = self.generation + (self.state != LOADING)
        schema = _schema(spec, self._plan, number, self.epoch, self.owner)

        def step() -> None:
            if self.dataset.schema.metadata != schema.metadata:
                self.refresh(self.commit_operation(LanceOperation.Overwrite(schema, [])))

        self.retry(step)
        logger.info("%s: generation %d begins", self.location, number)

    def _check_same(self, spec: TableSpec) -> None:
        """Refuse to continue a table with other settings; the model's name alone may differ."""
        stored = TableSpec.from_metadata(self.dataset.schema.metadata, self.location.uri)
        old, new = asdict(stored), asdict(spec)
        remedy = "give the same one, another table, or --new-generation to begin this one anew"
        for field in (
            "fingerprint",
            "ratios",
            "store_dtype",
            "max_length",
            "keep_text",
            "template",
        ):
            if old[field] != new[field]:
                raise MismatchError(
                    field,
                    f"{self.location} was begun with {field} {old[field]!r}, this job has "
                    f"{new[field]!r}: {remedy}",
                )
        if self.metadata[PLAN] != self._plan.hash:
            raise MismatchError(
                "input",
                f"{self.location} was begun with other input, another shard size or another limit, "
                f"or was changed by `kalm sync` or `kalm delete` (plan {self.metadata[PLAN]}, now "
                f"{self._plan.hash}): {remedy}. `kalm sync` brings a complete table up to date",
            )


def create_table(location: Location, schema: pa.Schema) -> None:
    """Create an empty table, unless one is there."""
    try:
        lance.write_dataset(
            schema.empty_table(),
            location.uri,
            schema=schema,
            mode="create",
            data_storage_version="2.2",
            enable_stable_row_ids=True,
            storage_options=location.options,
        )
    except OSError as error:
        if "already exists" not in str(error):
            raise InputError(
                f"cannot create a table at {location}: {first_line(error)}. "
                f"`kalm doctor {location}` says what is wrong with the place"
            ) from error


def _schema(spec: TableSpec, plan: Plan, generation: int, epoch: int, owner: str) -> pa.Schema:
    """Return the schema of a table that is to hold a plan, with the ledger's facts."""
    schema = spec.schema()
    facts = {
        EPOCH: str(epoch),
        OWNER: owner,
        STATE: LOADING,
        GENERATION: str(generation),
        PLAN: plan.hash,
        NUM_SHARDS: str(len(plan.shards)),
        NUM_ROWS: str(plan.num_rows),
    }
    return schema.with_metadata({**schema.metadata, **facts})
