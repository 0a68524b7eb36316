"""Tables on the Hugging Face hub: one version of a table is copied to this machine and read there.

The hub answers each range of a file with a request through the internet, so that a table is read
from it once and not row by row.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote

from kalm_encoder.errors import InputError, TableError, first_line

SCHEME = "hf://"
ADDRESS = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+?)/*")


class HubAddress(NamedTuple):
    """The address of a folder in a dataset of the hub.

    Attributes:
        repo: Owner and name of the dataset.
        revision: Branch, tag or commit; None for `main`.
        path: The folder.
    """

    repo: str
    revision: str | None
    path: str

    def at(self, commit: str) -> str:
        """Return the address at a commit, which always means the same bytes."""
        return f"{SCHEME}datasets/{self.repo}@{commit}/{self.path}"


def is_on_hub(uri: str) -> bool:
    """Return whether an address is one of the hub."""
    return uri.startswith(SCHEME)


def parse(uri: str) -> HubAddress:
    """Take an address apart.

    Raises:
        InputError: If it names no folder in a dataset.
    """
    found = ADDRESS.fullmatch(uri)
    if found is None:
        raise InputError(
            f"{uri} names no table in a dataset of the hub: write "
            "hf://datasets/OWNER/NAME/TABLE.lance, or with a revision hf://datasets/OWNER/NAME@REVISION/…"
        )
    return HubAddress(found[1], found[2] and unquote(found[2]), found[3])


def download(uri: str) -> tuple[str, str]:
    """Copy a table to the cache of this machine, unless it is there.

    Returns:
        The path of the copy, and the address at the commit that was read.

    Raises:
        InputError: If the address names no folder in a dataset.
        TableError: If the hub has no such table, or cannot be asked and the copy is not here.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - it takes half a second

    place = parse(uri)
    try:
        folder = snapshot_download(
            place.repo,
            repo_type="dataset",
            revision=place.revision,
            allow_patterns=f"{place.path}/**",
        )
    except (OSError, ValueError) as error:  # huggingface_hub's own errors are of these kinds
        raise TableError(f"no passage table at {uri}: {first_line(error)}") from error
    commit = folder.rstrip("/").rpartition("/")[2]
    return f"{folder}/{place.path}", place.at(commit)
