"""Which shards are in the table: the table itself says so.

A shard is done when the Lance commit that carries its rows is done; there is no other mark. Shard k
becomes the fragment with id k + 1, and Lance refuses a commit with a fragment id that exists, so no
shard can be committed twice. While shards are added, nothing is deleted, compacted or indexed: a
fragment id that is used again under an index gives wrong answers. finish.py does all that after the
seal.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import lance
import pyarrow as pa
from lance.dataset import LanceOperation

from kalm_encoder.errors import InputError, KalmError, MismatchError, first_line
from kalm_encoder.table.location import Location
from kalm_encoder.table.reader import LIVE_TAG
from kalm_encoder.table.spec import SPEC_KEY, TableSpec
from pipeline.corpus.shards import Plan
from pipeline.messages import ShardResult
from pipeline.table.claim import EPOCH, LOADING, OWNER, SEALED, STATE, TableClaim
from pipeline.table.fragments import check_written, with_id, write_once

logger = logging.getLogger(__name__)

PLAN, NUM_SHARDS, NUM_ROWS = "kalm.plan", "kalm.num_shards", "kalm.num_rows"
HUB = "kalm.hub"
"""Metadata key: the datasets of the hub that were read, each at its commit, with commas."""
EMPTY_SHARDS, GENERATION = "kalm.empty_shards", "kalm.generation"
ON_DUPLICATE, REJECTED = "kalm.on_duplicate", "kalm.rejected"
FIXED_SETTINGS = (
    *("fingerprint", "ratios", "store_dtype", "max_length", "keep_text", "template"),
    *("compute_dtype", "split", "metadata_columns"),
)
"""Fields of the spec in which all shards of a table agree. The model's name may differ."""


class Ledger(TableClaim):
    """The claim to a table while shards are added.

    Attributes:
        done: Numbers of the committed shards.
        num_rows: Number of committed rows.
    """

    def __init__(self, location: Location, plan: Plan) -> None:
        self._plan = plan
        super().__init__(location)
        self._compute_dtype = self.spec.compute_dtype

    @classmethod
    def begin(
        cls, location: Location, spec: TableSpec, plan: Plan, *, new_generation: bool = False
    ) -> Ledger:
        """Create the table, or claim the one that exists.

        Args:
            location: Address of the table.
            spec: What the table is to record.
            plan: The shards it is to hold.
            new_generation: Begin the table anew if it was made from other input or with other
                settings. Readers keep the live version until the new rows are published. A table
                in which no shard is done is begun anew in any case.

        Raises:
            MismatchError: If the table was made with other settings or from other input.
            TableError: If a Lance table exists there that is not a passage table.
            InputError: If no table can be created there.
        """
        if not location.uri.rstrip("/").endswith(".lance"):
            raise InputError(f"the table address {location} must end in .lance (LanceDB needs it)")
        schema = _schema(spec, plan, generation=1, epoch=0, owner="")
        try:
            write_once(schema.empty_table(), location, schema)
        except OSError as error:
            raise InputError(
                f"cannot create a table at {location}: {first_line(error)}. "
                f"`kalm doctor {location}` says what is wrong with the place"
            ) from error
        ledger = cls(location, plan)
        try:
            ledger._check_same(spec)
        except MismatchError:
            if not new_generation and (ledger.done or ledger.sealed):
                raise
            ledger._begin_anew(spec)
        if not ledger.sealed:
            ledger.take_over()
        return ledger

    @property
    def sealed(self) -> bool:
        """Whether all shards are in the table and no more can be added."""
        return self.state != LOADING

    @property
    def spec(self) -> TableSpec:
        """What the table records about its model and settings."""
        return TableSpec.from_metadata(self.dataset.schema.metadata, self.location.uri)

    @property
    def generation(self) -> int:
        """How often the table was begun, counted from 1."""
        return int(self.metadata[GENERATION])

    def is_live(self) -> bool:
        """Return whether the live version is one of this generation."""
        if LIVE_TAG not in self.dataset.tags.list():
            return False
        live = self.dataset.checkout_version(LIVE_TAG).schema.metadata
        return bool(live[GENERATION.encode()].decode() == self.metadata[GENERATION])

    def admit(self, result: ShardResult) -> None:
        """Refuse a shard whose states were computed in another dtype than those before it.

        Raises:
            MismatchError: If they were; it names the worker.
        """
        computed = result.compute_dtype
        if computed is None or self._compute_dtype in (None, computed):
            self._compute_dtype = self._compute_dtype or computed
            return
        raise MismatchError(
            "compute_dtype",
            f"the worker {result.worker} computes in {computed}, the states of {self.location} are "
            f"computed in {self._compute_dtype}: give --dtype float32 or bfloat16, so that all "
            "workers compute in the same",
        )

    def commit(self, results: Sequence[ShardResult]) -> None:
        """Add written shards, each admitted before, to the table in one atomic step.

        Raises:
            FencedError: If another driver claimed the table; this one added none of the results.
            KalmError: If a data file is not what its worker wrote.
            OSError: If the store refused; the shards are not in the table.
        """
        written = {r.shard.number: r.fragment for r in results if r.fragment is not None}
        check_written(list(written.values()), self.location)
        spec = self.spec
        if written and spec.format_version > 1 and spec.compute_dtype != self._compute_dtype:
            spec = replace(spec, compute_dtype=self._compute_dtype)
            self.change({SPEC_KEY: spec.to_json()})
        self.retry(lambda: self._append(written))
        empty = {r.shard.number for r in results if r.fragment is None} - self.done
        if empty:
            known = sorted(self._empty_shards() | empty)
            self.change({EMPTY_SHARDS: ",".join(map(str, known))})
            self.done |= empty

    def seal(self, on_duplicate: str = "error", rejected: int | None = None) -> None:
        """Check that every planned shard is there once, and let no more in.

        Args:
            on_duplicate: What `SealedTable.finish` does about repeated ids. It is recorded here, so
                that a run that continues after a crash does the same.
            rejected: Number of rejects. None if each row of the plan is a reject or one passage.

        Raises:
            KalmError: If the table does not hold exactly the planned shards.
            FencedError: If another driver claimed the table.
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
        if rejected is None:
            rejected = self._plan.num_rows - self.num_rows
        self.change({STATE: SEALED, ON_DUPLICATE: on_duplicate, REJECTED: str(rejected)})

    def refresh(self, dataset: lance.LanceDataset) -> None:
        """Continue from a version that any process may have made; read which shards are done."""
        self.move_to(dataset)
        self.num_rows = dataset.count_rows()
        if self.metadata.get(STATE, LOADING) == LOADING:
            ids = {fragment.fragment_id - 1 for fragment in dataset.get_fragments()}
            self.done = ids | self._empty_shards()
        else:  # Compaction gives fragments other ids, but after the seal every shard is there.
            self.done = set(range(int(self.metadata[NUM_SHARDS])))

    def _append(self, written: dict[int, str]) -> None:
        """Add those shards that are missing. Success says what is there, so nothing is re-read."""
        left = {number: f for number, f in written.items() if number not in self.done}
        if not left:
            return
        fragments = [with_id(fragment, number + 1) for number, fragment in left.items()]
        self.move_to(self.commit_operation(LanceOperation.Append(fragments)))
        self.done |= left.keys()
        self.num_rows += sum(f.num_rows for f in fragments)

    def _empty_shards(self) -> set[int]:
        """Return the shards whose rows were all rejected: no fragment stands for them."""
        return {int(n) for n in self.metadata.get(EMPTY_SHARDS, "").split(",") if n}

    def _begin_anew(self, spec: TableSpec) -> None:
        """Begin a new generation: no rows, no index, and fragment ids from 1 again."""
        self.take_over()
        number = self.generation + self.sealed
        schema = _schema(spec, self._plan, generation=number, epoch=self.epoch, owner=self.owner)

        def step() -> None:
            if self.dataset.schema.metadata != schema.metadata:
                self.refresh(self.commit_operation(LanceOperation.Overwrite(schema, [])))

        self.retry(step)
        self._compute_dtype = spec.compute_dtype
        logger.info("%s: generation %d begins", self.location, number)

    def _check_same(self, spec: TableSpec) -> None:
        """Refuse to continue a table that was made with other settings or from other input."""
        stored = self.spec
        if stored.files_hash is None:  # the fingerprint of an older table is that hash
            spec = replace(spec, fingerprint=spec.files_hash or spec.fingerprint)
        remedy = "give the same one, another table, or --new-generation to begin this one anew"
        for name in FIXED_SETTINGS:
            old, new = getattr(stored, name), getattr(spec, name)
            is_unknown = name == "compute_dtype" and None in (old, new)
            if old != new and not is_unknown:
                begun = f"{self.location} was begun with {name} {old!r}, this job has {new!r}"
                raise MismatchError(name, f"{begun}: {remedy}")
        begun_from = self.metadata.get(HUB, "")
        now = self._plan.hub_commits
        if begun_from and now != begun_from:
            raise MismatchError(
                "input",
                f"{self.location} was begun from {begun_from} of the Hugging Face hub, this job "
                f"reads {now or 'another corpus'}: name that commit in the address to go on, such "
                f"as hf://{begun_from.split(',')[0]}/…, run `kalm sync` on the complete table, or "
                "encode with --new-generation",
            )
        if self.metadata[PLAN] != self._plan.hash:
            raise MismatchError(
                "input",
                f"{self.location} was begun with other input, another shard size or another limit, "
                f"or was changed by `kalm sync` or `kalm delete` (plan {self.metadata[PLAN]}, now "
                f"{self._plan.hash}): {remedy}. `kalm sync` brings a complete table up to date",
            )


def _schema(spec: TableSpec, plan: Plan, *, generation: int, epoch: int, owner: str) -> pa.Schema:
    """Return the schema of a table that is to hold a plan, with what the ledger records."""
    schema = spec.schema()
    facts = {
        EPOCH: str(epoch),
        OWNER: owner,
        STATE: LOADING,
        GENERATION: str(generation),
        PLAN: plan.hash,
        NUM_SHARDS: str(len(plan.shards)),
        NUM_ROWS: str(plan.num_rows),
        HUB: plan.hub_commits,
    }
    return schema.with_metadata({**schema.metadata, **facts})
