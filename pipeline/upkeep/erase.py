"""Erases passages for good: afterwards no object of the table holds their text or their states.

`kalm delete` only marks rows as deleted, which is quick; their bytes stay in data files, indexes
and older versions. An erasure deletes, rewrites every data file that holds a deleted row, makes the
indexes anew, moves all tags to the new version and removes all others. It also removes what earlier
deletes and syncs left behind. If it is interrupted, the same command finishes it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import lance

from kalm_encoder.errors import InputError, KalmError, first_line
from kalm_encoder.table.location import Location
from kalm_encoder.table.reader import LIVE_TAG
from kalm_encoder.version import __version__
from pipeline.corpus.erased import ErasedIds
from pipeline.table.erasures import begin_erasure, erasures, write_erasure
from pipeline.table.finish import SealedTable
from pipeline.table.ledger import GENERATION
from pipeline.table.publish import PREVIOUS_TAG, publish, set_tag
from pipeline.table.rejects import RejectStore
from pipeline.table.side_files import KALM, STEPS, SYNCS, is_data
from pipeline.table.steps import Steps
from pipeline.upkeep.delete import passages_and_documents, row_ids_of
from pipeline.workers.local import in_process

OF_LANCE = ("_refs/tags/", "_versions/latest_version_hint.json")
"""Files of Lance that belong to no version; they hold names and numbers."""


def erase(
    table: Location, ids: Sequence[str] = (), *, where: str | None = None, wait_s: float = 30.0
) -> dict[str, Any]:
    """Erase passages from a table, and prove it.

    Args:
        table: A complete table.
        ids: Ids to erase. One that the table does not hold is refused from now on all the same. Of
            a table of split documents they may be documents; a document of which a passage was
            erased is refused as a whole, as its text may come back under another number.
        where: SQL predicate over the columns; the rows that satisfy it are erased too.
        wait_s: Seconds between the moment when readers switch and the removal of what they read
            before. A reader that opened the table earlier and does not follow `live` fails then.

    Returns:
        The certificate: salt and hashes of the ids, rows deleted, the version that is left, the
        paths of the objects that were removed, and the checks that were made.

    Raises:
        InputError: If the table is not complete, a tag of somebody else names a version, another
            generation is live, or the predicate is wrong. Nothing was changed.
        FencedError: If another process claimed the table.
        KalmError: If a check failed: run the command again.
    """
    claim, steps = SealedTable(table), Steps(in_process)
    _check_tags(claim)
    before = _paths(table)
    chosen = {*ids, *_ids_where(claim.dataset, where)}
    if claim.spec.split:
        chosen |= passages_and_documents(claim.dataset, chosen)
    claim.begin_change()
    erased = begin_erasure(table, chosen)
    rows = row_ids_of(claim.dataset, sorted(chosen))
    if begun := _left_by_another_run(table, erased, chosen):
        rows |= _rows_of(claim.dataset, begun)
    claim.retry(lambda: claim.delete(list(rows.values())))
    claim.retry(lambda: claim.purge(steps))
    claim.finish(steps, compact=False)
    version = publish(table)
    set_tag(table, PREVIOUS_TAG, version)
    time.sleep(wait_s)
    _remove_rest(table, erased)
    checks = _checks(table, erased, version)
    if failed := [check for check, holds in checks.items() if not holds]:
        raise KalmError(f"{table} is not clean yet ({'; '.join(failed)}): run the same again")
    certificate = {
        "table": table.uri,
        "library_version": __version__,
        "salt": erased.salt,
        "ids": sorted({erased.hash(id) for id in chosen} | (begun.hashes if begun else set())),
        "rows_deleted": len(rows),
        "version": version,
        "objects_removed": sorted(before - _paths(table)),
        "checks": list(checks),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    for erasure in erasures(table):
        if erasure["finished"] is None:
            write_erasure(table, {**certificate, "ids": erasure["ids"]})
    return certificate


def _check_tags(claim: SealedTable) -> None:
    """Refuse a table of which a version must stay.

    Raises:
        InputError: If there is one; it says which.
    """
    tags = claim.dataset.tags.list()
    if other := sorted(tags.keys() - {LIVE_TAG, PREVIOUS_TAG}):
        raise InputError(
            f"the tag {other[0]!r} keeps version {tags[other[0]]['version']} of {claim.location}, "
            "which may hold what is to be erased: delete the tag first"
        )
    live = claim.dataset.checkout_version(LIVE_TAG).schema.metadata if LIVE_TAG in tags else {}
    generation = claim.metadata[GENERATION]
    if live.get(GENERATION.encode(), b"").decode() != generation:
        raise InputError(
            f"generation {generation} of {claim.location} is not live, and an erasure removes all "
            f"others: run `kalm publish {claim.location}` first"
        )


def _ids_where(dataset: lance.LanceDataset, where: str | None) -> list[str]:
    if where is None:
        return []
    try:
        ids: list[str] = dataset.scanner(columns=["id"], filter=where).to_table()["id"].to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(f"the predicate {where!r} is refused: {first_line(error)}") from error
    return ids


def _left_by_another_run(table: Location, erased: ErasedIds, chosen: set[str]) -> ErasedIds | None:
    """Return the ids that an interrupted erasure recorded, if this one was not asked for them."""
    begun = {h for e in erasures(table) if e["finished"] is None for h in e["ids"]}
    left = begun - {erased.hash(id) for id in chosen}
    return ErasedIds(erased.salt, frozenset(left)) if left else None


def _rows_of(dataset: lance.LanceDataset, erased: ErasedIds) -> dict[str, int]:
    """Find the rows with these ids, of which only hashes are known: all ids are read."""
    found: dict[str, int] = {}
    for batch in dataset.scanner(columns=["id"], with_row_id=True).to_batches():
        pairs = zip(batch["id"].to_pylist(), batch["_rowid"].to_pylist(), strict=True)
        found |= {id: row for id, row in pairs if id in erased}
    return found


def _remove_rest(table: Location, erased: ErasedIds) -> None:
    """Remove all other versions, what no version names, staged changes and rejects."""
    table.dataset().cleanup_old_versions(
        older_than=timedelta(0), delete_unverified=True, error_if_tagged_old_versions=False
    )
    session = table.file_session()
    left = [*session.list(SYNCS), *session.list(STEPS)]  # the latter holds hashes of ids
    for path in sorted(left, key=is_data):
        session.delete_file(path)
    store = RejectStore(table)
    store.drop({r.id for r in store.read() if r.id is not None and r.id in erased})


def _checks(table: Location, erased: ErasedIds, version: int) -> dict[str, bool]:
    """Check what an erasure promises; return each check and whether it holds."""
    dataset = table.dataset()
    tracked = set(dataset.tracked_files().read_all()["path"].to_pylist())
    others = {path for path in _paths(table) - tracked if not path.startswith(OF_LANCE)}
    tags = dataset.tags.list()
    return {
        "the table has one version": [v["version"] for v in dataset.versions()] == [version],
        "every tag names it": {tag["version"] for tag in tags.values()} == {version},
        "no data file holds a deleted row": not any(
            fragment.num_deletions for fragment in dataset.get_fragments()
        ),
        "no row has an erased id": not _rows_of(dataset, erased),
        "every object belongs to this version or to the records of this project": all(
            path.startswith(f"{KALM}/") and not path.startswith((f"{SYNCS}/", f"{STEPS}/"))
            for path in others
        ),
    }


def _paths(table: Location) -> set[str]:
    """Return the paths of all objects of a table, below its folder."""
    return set(table.dataset().all_files().read_all()["path"].to_pylist())
