"""Changes to a complete table that need no model: delete passages, merge small fragments."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import lance
import pyarrow as pa
import pyarrow.compute as pc

from kalm_encoder.errors import MissingIdsError
from kalm_encoder.table.ids import ids_in
from kalm_encoder.table.location import Location
from kalm_encoder.table.reader import LIVE_TAG
from pipeline.messages import Executor
from pipeline.table.claim import COMPLETE
from pipeline.table.finish import SealedTable
from pipeline.table.publish import publish, publish_rest
from pipeline.table.steps import Steps
from pipeline.workers.local import in_process

IDS_AT_ONCE = 10_000
"""Most ids that one query looks up."""


def delete(table: Location, ids: Sequence[str]) -> int:
    """Delete passages by id, publish the table without them and return how many were deleted.

    Raises:
        MissingIdsError: If some ids are not in the table; then nothing is deleted.
    """
    claim = SealedTable(table)
    unique = list(dict.fromkeys(ids))
    found = row_ids_of(claim.dataset, unique)
    missing = [i for i in unique if i not in found]
    if missing and claim.state == COMPLETE:  # A delete that was interrupted has done some already.
        live = claim.dataset.checkout_version(LIVE_TAG)
        if len(row_ids_of(live, missing)) < len(missing):
            raise MissingIdsError(missing, table.uri)
        publish_rest(table)  # An earlier delete was killed just before it published.
        if not found:
            return len(missing)
    claim.begin_change()
    claim.retry(lambda: claim.delete(list(found.values())))
    claim.finish(Steps(in_process), compact=False)
    publish(table)
    return len(found)


def row_ids_of(dataset: lance.LanceDataset, ids: Sequence[str]) -> dict[str, int]:
    """Return the stable row id of each of these ids that the table holds."""
    found: dict[str, int] = {}
    for start in range(0, len(ids), IDS_AT_ONCE):
        wanted = ids_in(ids[start : start + IDS_AT_ONCE])
        rows = dataset.scanner(columns=["id"], filter=wanted, with_row_id=True).to_table()
        found |= zip(rows["id"].to_pylist(), rows["_rowid"].to_pylist(), strict=True)
    return found


def passages_and_documents(dataset: lance.LanceDataset, ids: Collection[str]) -> set[str]:
    """Return ids of a table of split documents with the other names of what they stand for.

    These are the passages of those ids that are documents, and the documents of the others.
    """
    wanted = ids_in(ids) | pc.field("doc_id").isin(pa.array(list(ids), pa.string()))
    rows = dataset.scanner(columns=["id", "doc_id"], filter=wanted).to_table()
    return {*ids, *rows["id"].to_pylist(), *rows["doc_id"].to_pylist()}


def compact(table: Location, execute: Executor = in_process) -> None:
    """Merge small fragments, bring the indexes up to date, and publish."""
    claim = SealedTable(table)
    claim.begin_change(rows=False)
    claim.finish(Steps(execute))
    publish(table)
