"""Merges fragments on the workers: Lance plans the tasks, the workers do them, one commit ends it.

With stable row ids neither the indexes nor the order of the rows change.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import xxhash
from lance.fragment import FragmentMetadata
from lance.optimize import Compaction, CompactionOptions, CompactionTask, RewriteResult

from kalm_encoder.errors import KalmError
from pipeline.messages import Part, Place
from pipeline.table.claim import TableClaim
from pipeline.table.fragments import check_written, fragments_key
from pipeline.table.side_files import FINISH
from pipeline.table.steps import DoPart, Steps, VersionWork, remove_step


@dataclass(frozen=True, kw_only=True)
class RewriteFragments(VersionWork):
    """Tasks of a compaction."""

    def load(self, place: Place) -> DoPart:
        """Open the table. A part is a task, and its result what the commit needs, both as JSON."""
        dataset = self.dataset()
        return lambda task: CompactionTask.from_json(task).execute(dataset).json()


def rewrite(claim: TableClaim, steps: Steps, options: CompactionOptions) -> None:
    """Rewrite the fragments that Lance chooses by these options, in one commit.

    Raises:
        IncompleteError: If some tasks failed for good; the others are not done again.
        KalmError: If files that an interrupted run had written are gone.
        OSError: If another process claimed the table, or the store refused.
    """
    dataset = claim.dataset
    tasks = [_without_exclusions(task) for task in Compaction.plan(dataset, options).tasks]
    if not tasks:
        return
    chosen = xxhash.xxh3_64_hexdigest(json.dumps(options, sort_keys=True).encode())
    folder = f"{FINISH}/{fragments_key(dataset)}/rewrite-{chosen}"
    work = RewriteFragments(table=claim.location, version=dataset.version)
    parts = [Part(number, task) for number, task in enumerate(tasks)]
    done = steps.results("merging fragments", work, parts, claim.location / folder)
    # An earlier run may have recorded them: its claim was another version with the same fragments.
    results = [{**json.loads(result), "read_version": dataset.version} for result in done]
    rewrites = [RewriteResult.from_json(json.dumps(result)) for result in results]
    written = [fragment for result in rewrites for fragment in result.new_fragments]
    try:
        check_written([_text(fragment) for fragment in written], claim.location)
    except KalmError:
        remove_step(claim.location, folder)  # or the next run would find the same result
        raise
    Compaction.commit(dataset, rewrites, options)
    claim.refresh(dataset)


def _without_exclusions(task: CompactionTask) -> str:
    """Return a task as JSON without the ids of the fragments that are none of its business.

    The planner copies them into each task, up to a megabyte.
    """
    fields = json.loads(task.json())
    fields["options"]["excluded_fragment_ids"] = []
    return json.dumps(fields)


def _text(fragment: FragmentMetadata) -> str:
    return json.dumps(fragment.to_json())
