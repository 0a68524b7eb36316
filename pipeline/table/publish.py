"""Which version readers see: the one that the tag `live` names. It moves last, in one step."""

from __future__ import annotations

import lance

from kalm_encoder.errors import InputError, first_line
from kalm_encoder.table.location import Location
from kalm_encoder.table.reader import LIVE_TAG
from pipeline.table.claim import COMPLETE, STATE
from pipeline.table.ledger import GENERATION

PREVIOUS_TAG = "previous"
"""The tag that names the version which was live before."""


def publish(table: Location, version: int | None = None) -> int:
    """Point `live` at a complete version, and `previous` at the version that was live.

    Args:
        table: Address of the table.
        version: Version to publish; None takes the latest.

    Returns:
        The version that is live now.

    Raises:
        InputError: If there is no such version, or it is not complete.
    """
    dataset = table.dataset()
    try:
        chosen = dataset if version is None else dataset.checkout_version(version)
    except (ValueError, OSError) as error:
        raise InputError(f"{table} has no version {version}: {first_line(error)}") from error
    state = (chosen.schema.metadata or {}).get(STATE.encode(), b"?").decode()
    if state != COMPLETE:
        raise InputError(
            f"version {chosen.version} of {table} is {state}, and only a complete version can be "
            "live: run the command that makes it again"
        )
    live = tagged_version(dataset, LIVE_TAG)
    if live != chosen.version:
        if live is not None:
            set_tag(table, PREVIOUS_TAG, live)
        set_tag(table, LIVE_TAG, chosen.version)
    return int(chosen.version)


def publish_rest(table: Location) -> None:
    """Publish the latest version if a command that was killed left it complete, but not live.

    A new generation stays as it is: it is the user who publishes that.
    """
    dataset = table.dataset()
    live = tagged_version(dataset, LIVE_TAG)
    shown = dataset if live is None else dataset.checkout_version(live)
    key = GENERATION.encode()
    if shown.schema.metadata[key] == dataset.schema.metadata[key]:
        publish(table)


def rollback(table: Location) -> int:
    """Swap `live` and `previous`, and return the version that is live now.

    Raises:
        InputError: If only one version was ever published.
    """
    previous = tagged_version(table.dataset(), PREVIOUS_TAG)
    if previous is None:
        raise InputError(f"{table} has no earlier published version to go back to")
    return publish(table, previous)


def tagged_version(dataset: lance.LanceDataset, tag: str) -> int | None:
    """Return the version that a tag names, or None if there is no such tag."""
    tags = dataset.tags.list()
    return int(tags[tag]["version"]) if tag in tags else None


def set_tag(table: Location, tag: str, version: int) -> None:
    """Let a tag name a version, whether or not there is such a tag."""
    tags = table.tags()
    if tag in tags.list():
        tags.update(tag, version)
    else:
        tags.create(tag, version)
