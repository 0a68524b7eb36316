"""Uploads the published version of a table to a dataset of the Hugging Face hub, with a card.

Only the files of that version travel, all in one commit: readers of the dataset see the table as it
was or as it is. What the folder held before and the version has not goes in the same commit.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from kalm_encoder.errors import InputError, first_line
from kalm_encoder.table import hub
from kalm_encoder.table.location import Location
from kalm_encoder.table.reader import LIVE_TAG, PassageTable
from kalm_encoder.version import __version__
from pipeline.upkeep.verify import verify

CARD = "README.md"
MARK = "kalm-preencode"
"""Tag of the cards that are made here; a card without it is somebody's own and stays."""


def push(location: Location, to: str, *, private: bool = False) -> str:
    """Verify the live version of a table and upload it.

    Args:
        location: Address of the table.
        to: Address of a folder in a dataset of the hub, which is made if it is not there.
        private: Whether a dataset that is made is private.

    Returns:
        The address at the commit that was made.

    Raises:
        TableError: If there is no complete table.
        InputError: If the table is damaged, or the hub refuses.
    """
    place = hub.parse(to)
    if place.revision is not None:
        raise InputError(f"{to} names a revision: leave @{place.revision} out, a push makes one")
    table = PassageTable.open(location.uri, storage_options=location.options)
    report = verify(location.uri, version=table.version, storage_options=location.options)
    if report.num_problems:
        raise InputError(
            f"{location} has {report.num_problems} problems, such as {report.problems[0].detail}: "
            "`kalm verify` lists them. A damaged table is not uploaded"
        )
    api = HfApi(library_name=MARK, library_version=__version__)
    with tempfile.TemporaryDirectory(prefix="kalm-push-") as folder:
        try:
            api.create_repo(place.repo, repo_type="dataset", private=private, exist_ok=True)
            present = api.list_repo_files(place.repo, repo_type="dataset")
            operations = _operations(location, table, place, present, Path(folder))
            card = _card(table, place, report.rows)
            own = CARD not in present or MARK in _text(api, place.repo)
            name = CARD if own else f"{place.path}/{CARD}"
            operations.append(CommitOperationAdd(name, card.encode()))
            done = api.create_commit(
                place.repo,
                operations,
                repo_type="dataset",
                commit_message=f"Version {table.version} of {place.path}",
            )
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise InputError(f"cannot push to {to}: {first_line(error)}") from error
    return place.at(str(done.oid))


def _operations(
    location: Location,
    table: PassageTable,
    place: hub.HubAddress,
    present: list[str],
    folder: Path,
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Return what puts the files of a version in place of what is in the folder."""
    tracked = table.dataset.tracked_files().read_all().to_pylist()
    paths = {row["path"] for row in tracked if row["version"] == table.version}
    paths.add(f"_refs/tags/{LIVE_TAG}.json")
    wanted = {f"{place.path}/{path}" for path in paths}
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationDelete(path)
        for path in present
        if path.startswith(f"{place.path}/") and path not in wanted
    ]
    session = location.file_session()
    for number, path in enumerate(sorted(paths)):
        file = Path(location.uri, path)
        if not location.is_local:
            file = folder / str(number)
            session.download_file(path, str(file))
        operations.append(CommitOperationAdd(f"{place.path}/{path}", str(file)))
    return operations


def _text(api: HfApi, repo: str) -> str:
    """Return the card of a dataset."""
    return Path(api.hf_hub_download(repo, CARD, repo_type="dataset")).read_text(encoding="utf-8")


def _card(table: PassageTable, place: hub.HubAddress, rows: int) -> str:
    """Return the card of a table: what it holds, how it was checked, and how it is read."""
    spec, address = table.spec, f"{hub.SCHEME}datasets/{place.repo}/{place.path}"
    head = {"tags": [MARK, "lance", "text-ranking"]}
    if spec.revision and "/" in spec.model:
        head["base_model"] = [spec.model]
    size = sum(
        file.file_size_bytes or 0
        for f in table.dataset.get_fragments()
        for file in f.metadata.files
    )
    facts = {
        "model": spec.model if spec.revision else Path(spec.model).name,
        "revision of the model": spec.revision or "local directory",
        "fingerprint": spec.fingerprint,
        "ratios": ", ".join(map(str, spec.ratios)),
        "stored as": f"{spec.store_dtype}, computed in {spec.compute_dtype or 'float32'}",
        "passages": f"{rows:,}",
        "bytes": f"{size:,}",
        "text": "stored" if spec.keep_text else "not stored",
        "metadata": ", ".join(map(":".join, spec.metadata_columns)) or "none",
        "version": str(table.version),
        "verified": f"{rows:,} rows and their checksums, 0 problems",
    }
    lines = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
{head}
---

# {place.path}

Passages that were encoded once, so that a query only runs the decoder of the model.
Made and read by kalm-preencode {__version__}.

| | |
|---|---|
{lines}

```
kalm rerank {address} --query "…"
```
"""
