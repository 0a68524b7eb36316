"""Builds the indexes of a table on the workers: a segment per group of fragments.

After rows were added or changed, an index is built anew and replaces the one before. Lance's own
`optimize_indices` merges the new rows into the old index in one process: with 1 % of 10 million
rows changed, a full-text index took it 175 CPU seconds and 2.1 GB, and building it takes 48 CPU
seconds and 1.0 GB, which the workers share. A segment of the new rows alone beside the old one
would answer wrongly in a table that was ever changed by `merge_insert`, as tables once were: a row
that it updates keeps its row id, and the old segment finds it by its old value.

The segments of a B-tree or a list of labels are merged into one, because a look-up asks each
segment: 100 ids of 16 million took 23 ms in one segment and 88 ms in eight. Merging reads sorted
files and needs 17 MB per million ids. The segments of a full-text index stay: merging them needs as
much memory as the index, and Lance's own build cuts a large one into such pieces as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import xxhash
from lance.dataset import Index, IndexFile

from kalm_encoder.errors import KalmError
from pipeline.messages import Part, Place
from pipeline.table.claim import TableClaim
from pipeline.table.fragments import fragment_groups, fragments_key, open_to_write
from pipeline.table.side_files import FINISH
from pipeline.table.steps import DoPart, Steps, VersionWork, remove_step

BTREE, LABEL_LIST, INVERTED = "BTREE", "LABEL_LIST", "INVERTED"
GROUP_ROWS = 2_000_000
"""About how many rows a segment has before it is merged."""
TEXT_GROUP_ROWS = 8_000_000
"""About how many rows a segment of a full-text index has; it is not merged."""
INDICES = "_indices"
"""Folder of Lance for the segments, each in a folder by its UUID."""


@dataclass(frozen=True, kw_only=True)
class BuildSegments(VersionWork):
    """Segments of indexes that are to be built."""

    def load(self, place: Place) -> DoPart:
        """Open the table. A part is a column, a kind of index, its options and fragment ids."""
        dataset = self.dataset()

        def build(what: list[Any]) -> dict[str, Any]:
            column, kind, options, fragment_ids = what
            if kind == INVERTED and place.cpus:
                options = options | {"num_workers": place.cpus}
            # Lance lets only one thread at a time use a dataset for this.
            own = dataset.checkout_version(self.version)
            segment = own.create_index_uncommitted(
                column,
                kind,
                name=index_name(column),
                replace=True,
                fragment_ids=fragment_ids,
                **options,
            )
            return _to_json(segment)

        return build


@dataclass(frozen=True, kw_only=True)
class MergeSegments(VersionWork):
    """Segments of indexes that are to be merged."""

    def load(self, place: Place) -> DoPart:
        """Open the table. A part is a list of segments, its result the one that has all of them."""
        dataset = self.dataset()

        def merge(segments: list[dict[str, Any]]) -> dict[str, Any]:
            own = dataset.checkout_version(self.version)
            return _to_json(own.merge_existing_index_segments(list(map(_from_json, segments))))

        return merge


def index_name(column: str) -> str:
    """Return the name of the index of a column, as Lance would choose it."""
    return f"{column}_idx"


def bring_up_to_date(claim: TableClaim, steps: Steps, kinds: Mapping[str, str]) -> None:
    """Build the indexes that do not cover all rows, each in place of the one that is there.

    What somebody changed stays: the options of a full-text index, and an index of another kind or
    name, to which Lance adds the new rows in this process.

    Args:
        claim: The claim to the table, which has rows.
        steps: How the segments are built.
        kinds: The kind of index by column.

    Raises:
        As `create_indexes` does.
    """
    fragments = {fragment.fragment_id for fragment in claim.dataset.get_fragments()}
    present = {index.name: index for index in claim.dataset.describe_indices()}
    lacking: dict[str, tuple[str, dict[str, Any]]] = {}
    for column, kind in kinds.items():
        index = present.get(index_name(column))
        if index is None:
            lacking[column] = kind, {"with_position": False} if kind == INVERTED else {}
        elif index.index_type.upper() == kind.replace("_", ""):
            del present[index.name]
            if fragments - {id for segment in index.segments for id in segment.fragment_ids}:
                # Lance tells this option and does not take it; it is None for strings.
                options = {k: v for k, v in index.details.items() if k != "lance_tokenizer"}
                lacking[column] = kind, options if kind == INVERTED else {}
    create_indexes(claim, steps, lacking)
    if present:
        claim.dataset.optimize.optimize_indices(index_names=list(present))
    claim.refresh(open_to_write(claim.location))


def create_indexes(
    claim: TableClaim, steps: Steps, kinds: Mapping[str, tuple[str, dict[str, Any]]]
) -> None:
    """Build indexes of all rows and commit each in place of the one of the same name.

    Lance lets the commit of an index pass a claim that another process made meanwhile. Therefore
    the claim is looked at just before. An index that slips through all the same is right: it names
    the fragments that it covers, and Lance refuses it if these were compacted or overwritten.

    Args:
        claim: The claim to the table, which has rows.
        steps: How the segments are built.
        kinds: The kind of index and its options by column.

    Raises:
        IncompleteError: If some segments failed for good; the others are not built again.
        FencedError: If another process claimed the table.
        KalmError: If files that an interrupted run had written are gone.
        OSError: If the store refused.
    """
    if not kinds:
        return
    dataset, table = claim.dataset, claim.location
    what = [
        [column, kind, options, ids]
        for column, (kind, options) in kinds.items()
        for ids in fragment_groups(dataset, TEXT_GROUP_ROWS if kind == INVERTED else GROUP_ROWS)
    ]
    chosen_parts = xxhash.xxh3_64_hexdigest(json.dumps(what).encode())
    folder = f"{FINISH}/{fragments_key(dataset)}/index-{chosen_parts}"
    is_large = dataset.count_rows() > GROUP_ROWS
    building = BuildSegments(table=table, version=dataset.version, is_large=is_large)
    parts = [Part(number, some) for number, some in enumerate(what)]
    built = steps.do("building indexes", building, parts, table / folder / "built")
    segments: dict[str, list[dict[str, Any]]] = {column: [] for column in kinds}
    for part, segment in sorted(built, key=lambda pair: pair[0].number):
        segments[part.what[0]].append(segment)
    _check_files(claim, segments, folder)
    several = [c for c, some in segments.items() if len(some) > 1 and kinds[c][0] != INVERTED]
    merging = MergeSegments(table=table, version=dataset.version, is_large=is_large)
    parts = [Part(number, segments[column]) for number, column in enumerate(several)]
    chosen = dict(segments)
    for part, segment in steps.do("merging indexes", merging, parts, table / folder / "merged"):
        chosen[several[part.number]] = [segment]
    _check_files(claim, chosen, folder)
    for column, some in chosen.items():
        claim.look_again()
        claim.dataset.commit_existing_index_segments(
            index_name(column), column, list(map(_from_json, some))
        )
        claim.refresh(claim.dataset)
    for column in several:
        for segment in segments[column]:
            remove_step(table, f"{INDICES}/{segment['uuid']}")


def _check_files(
    claim: TableClaim, segments: Mapping[str, list[dict[str, Any]]], folder: str
) -> None:
    """Check that the files of segments are there; Lance commits without a look at them."""
    session = claim.location.file_session()
    for segment in (segment for some in segments.values() for segment in some):
        for path, _ in segment["files"]:
            if not session.contains(f"{INDICES}/{segment['uuid']}/{path}"):
                remove_step(claim.location, folder)  # or the next run would find it recorded
                raise KalmError(
                    f"the file {path} of the index segment {segment['uuid']} of {claim.location}, "
                    "which a worker wrote, is gone. Run again"
                )


def _to_json(index: Index) -> dict[str, Any]:
    """Return what a commit needs to know about a segment, as a JSON value."""
    details = index.index_details
    # On object stores Lance also lists the scratch files that it then removes.
    files = [file for file in index.files or [] if not file.path.startswith("staging/")]
    return {
        "uuid": index.uuid,
        "name": index.name,
        "fields": index.fields,
        "dataset_version": index.dataset_version,
        "fragment_ids": sorted(index.fragment_ids),
        "index_version": index.index_version,
        "created_at": index.created_at and index.created_at.isoformat(),
        "files": [[file.path, file.size_bytes] for file in files],
        "index_details": details and [details[0], details[1].hex()],
    }


def _from_json(value: Mapping[str, Any]) -> Index:
    details, created = value["index_details"], value["created_at"]
    return Index(
        **{
            **value,
            "created_at": created and datetime.fromisoformat(created),
            "files": [IndexFile(path, size) for path, size in value["files"]],
            "index_details": details and (details[0], bytes.fromhex(details[1])),
        }
    )
