"""Collects what `kalm status` prints: what a table holds, how large and how complete it is.

It reads the metadata and one small column, so that it is quick on a table of any size.
"""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc

from kalm_encoder.table.location import Location
from kalm_encoder.table.reader import LIVE_TAG
from kalm_encoder.table.spec import TableSpec
from pipeline.table.claim import COMPLETE, EPOCH, LOADING, STATE, metadata_of
from pipeline.table.ledger import EMPTY_SHARDS, GENERATION, NUM_ROWS, NUM_SHARDS, PLAN


def table_facts(table: Location) -> dict[str, Any]:
    """Return the facts of a table by name, as JSON takes them.

    Raises:
        TableError: There is no passage table here, or the store refused.
    """
    dataset = table.dataset()
    spec = TableSpec.from_metadata(dataset.schema.metadata, table.uri)
    metadata = metadata_of(dataset)
    fragments = [f.metadata for f in dataset.get_fragments()]
    rows = dataset.count_rows()
    batches = dataset.scanner(columns=["num_tokens"]).to_batches()
    tokens = sum(pc.sum(batch["num_tokens"]).as_py() or 0 for batch in batches)
    size = sum(file.file_size_bytes or 0 for f in fragments for file in f.files)
    num_shards, planned = int(metadata[NUM_SHARDS]), int(metadata[NUM_ROWS])
    empty = {n for n in metadata.get(EMPTY_SHARDS, "").split(",") if n}
    # Compaction merges fragments, but only once all shards are there.
    done = len(fragments) + len(empty) if metadata[STATE] == LOADING else num_shards
    tags = dataset.tags.list()
    facts = {
        "table": table.uri,
        "state": "complete" if metadata[STATE] == COMPLETE and LIVE_TAG in tags else "incomplete",
        "model": spec.model,
        "revision": spec.revision or "local directory",
        "fingerprint": spec.fingerprint,
        "ratios": ",".join(map(str, spec.ratios)),
        "store_dtype": spec.store_dtype,
        "keep_text": spec.keep_text,
        "metadata_columns": ",".join(map(":".join, spec.metadata_columns)) or "none",
        "dim": spec.dim,
        "max_length": spec.max_length,
        "passages": rows,
        "tokens": tokens,
        "truncated": dataset.count_rows(filter="truncated"),
        "bytes": size,
        "bytes_per_token": round(size / tokens, 2) if tokens else 0.0,
        "floor_bytes_per_token": round(spec.bytes_per_token, 2),
        "shards": num_shards,
        "shards_done": done,
        "shards_missing": num_shards - done,
        "rows_planned": planned,
        "version": int(dataset.version),
        "live_version": tags[LIVE_TAG]["version"] if LIVE_TAG in tags else None,
        "versions": len(dataset.versions()),
        "fragments": len(fragments),
        "phase": metadata[STATE],
        "generation": int(metadata[GENERATION]),
        "epoch": int(metadata[EPOCH]),
        "format_version": spec.format_version,
        "library_version": spec.library_version,
    }
    if done == num_shards and metadata[PLAN] != "changed":
        facts["rows_rejected_or_repeated"] = planned - rows
    return facts
