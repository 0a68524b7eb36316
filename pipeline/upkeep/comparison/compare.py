"""Compares a corpus with a complete table, by id, text hash and metadata, on the workers.

The workers write what tells passages and rows apart by hash and then join one partition after the
other, so that no process holds more than its share. What is done is recorded beside the table: a
driver that is killed repeats only what was under way. Texts are not kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import lance
import numpy as np
import xxhash

from kalm_encoder.errors import InputError
from kalm_encoder.table.location import Location
from pipeline.corpus.shards import Plan
from pipeline.messages import Part
from pipeline.run.first_look import id_field_remedy
from pipeline.table.fragments import fragment_groups, fragments_key
from pipeline.table.partitions import num_partitions
from pipeline.table.side_files import STEPS
from pipeline.table.steps import Steps, exchange
from pipeline.upkeep.comparison.corpus import SHARD_BITS, Corpus, most_rows
from pipeline.upkeep.comparison.differences import Changes, Groups, JoinWork
from pipeline.upkeep.comparison.sides import CorpusSide, TableSide


@contextmanager
def compared(
    steps: Steps,
    table: Location,
    dataset: lance.LanceDataset,
    corpus: Corpus,
    keep: str = "error",
    place: Location | None = None,
) -> Iterator[Changes]:
    """Count how a corpus differs from a table and find what to do, for a `with` block.

    The files that name it are removed at the end of the block. If it fails they stay, so that the
    same comparison need not be repeated. Those of a small one are on this machine alone.

    Args:
        steps: How the steps are done.
        table: Address of the table.
        dataset: The version that is compared.
        corpus: The corpus, or what changed in it.
        keep: Which passage of a repeated id counts: "first", "last", or "error".
        place: Where large comparisons have their folders. None takes one in the table's own.

    Raises:
        InputError: If an id is repeated and `keep` is "error".
        IncompleteError: If a part of the corpus or the table cannot be read.
    """
    parts, total = corpus.parts(), dataset.count_rows()
    groups = fragment_groups(dataset, most_rows(total))
    # Of a corpus of which only some rows are known, each piece looks up the table's rows itself.
    looks_up = corpus.lines is not None
    of_table = [] if looks_up else [Part(number, ids) for number, ids in enumerate(groups)]
    num_rows = sum(part.size for part in parts) + (0 if looks_up else total)
    partitions = num_partitions(num_rows)
    name = f"compare-{_name(dataset, corpus, keep)}"
    is_small = max(len(parts), len(groups), partitions) <= 1
    with exchange(steps, place or table / STEPS, name, is_small=is_small) as exchanged:
        folder = exchanged.folder
        of_both = {
            "table": table, "version": dataset.version, "folder": folder, "partitions": partitions,
        }  # fmt: skip
        side = CorpusSide(**of_both, reading=corpus.reading, looks_up=looks_up)
        read = exchanged.results("reading the corpus", side, parts)
        table_side = TableSide(**of_both, spec=corpus.reading.spec)
        table_files = exchanged.results("reading the table", table_side, of_table)
        joins = JoinWork(
            table=table,
            spec=corpus.reading.spec,
            folder=folder,
            corpus_files=tuple(piece["corpus"] for piece in read),
            table_files=tuple([piece["table"] for piece in read] if looks_up else table_files),
            starts=np.array([part.what.shards[0].number for part in parts], np.int64),
            group_starts=np.array([ids[0] for ids in groups], np.int64),
            keep="first" if keep == "error" else keep,
        )
        changes = Changes(
            folder,
            to_encode=Groups.none(len(parts)),
            to_update=Groups.none(len(parts)),
            missing_rows=Groups.none(len(groups)),
            surplus_rows=Groups.none(len(groups)),
            reject_files=[piece["rejects"] for piece in read if piece["rejected"]],
            rejected=sum(piece["rejected"] for piece in read),
        )
        numbers = [Part(number, number) for number in range(partitions)]
        for found in exchanged.results("comparing", joins, numbers):
            changes.add(found)
        if keep == "error":
            _refuse_repeated(corpus, changes)
        yield changes


def _refuse_repeated(corpus: Corpus, changes: Changes) -> None:
    if changes.repeated:
        remedy = id_field_remedy(shard.fields for shard in corpus.shards)
        ids = _ids_at(corpus, changes.shown)
        raise InputError(
            f"{changes.repeated} passages repeat an id of another: "
            f"{', '.join(map(repr, ids))}. {remedy}; or mend the "
            "corpus, or choose one with --on-duplicate first or last"
        )


def _name(dataset: lance.LanceDataset, corpus: Corpus, keep: str) -> str:
    """Return a name for all that the outcome of a comparison depends on."""
    erased, lines = corpus.reading.erased, corpus.lines
    facts = [
        fragments_key(dataset), keep, Plan(tuple(corpus.shards)).hash, erased.salt,
        sorted(erased.hashes),
        None if lines is None else xxhash.xxh3_128_hexdigest(lines.tobytes()),
    ]  # fmt: skip
    return xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())


def _ids_at(corpus: Corpus, places: list[int]) -> list[str]:
    """Return the ids of the passages at some places of a corpus."""
    numbers = {place >> SHARD_BITS for place in places}
    read = corpus.reading.open()
    found = {
        shard.number << SHARD_BITS | i: passage.id
        for part in corpus.parts()
        for shard, rows in read(part.what, numbers)
        for i, passage in enumerate(rows.passages)
    }
    return [found[place] for place in places]
