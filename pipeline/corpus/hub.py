"""Datasets of the Hugging Face hub as inputs: the commit that is read.

A branch such as `main` moves. So an address is pinned to its commit when it is listed, every worker
reads that commit, and the table records it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from kalm_encoder.table.hub import SCHEME
from pipeline.corpus.access import open_store, readable

PINNED = re.compile(r"hf://(datasets/[^@:]+@[0-9a-f]{40})(?=/|$)")
"""A dataset at a commit, in an address."""


def pinned(url: str) -> str:
    """Return a URL or chain in which each dataset of the hub names the commit it is at now.

    Raises:
        InputError: If the hub cannot be asked, or knows no such dataset or revision.
    """
    return "::".join(_pinned(part) if part.startswith(SCHEME) else part for part in url.split("::"))


def _pinned(part: str) -> str:
    if PINNED.match(part):
        return part
    from huggingface_hub import HfApi  # noqa: PLC0415 - only who reads from the hub waits for it

    with readable(part):
        fs, path = open_store(part, None)
        place = fs.resolve_path(path)
        asked = HfApi(endpoint=fs.endpoint, token=fs.token)
        commit = asked.repo_info(
            place.repo_id, repo_type=place.repo_type, revision=place.revision
        ).sha
    inside = f"/{place.path_in_repo}" if place.path_in_repo else ""
    return f"{SCHEME}{place.repo_type}s/{place.repo_id}@{commit}{inside}"


def commits(paths: Iterable[str]) -> str:
    """Return the datasets at their commits that are in some addresses, sorted, with commas."""
    return ",".join(sorted({found for path in paths for found in PINNED.findall(path)}))
