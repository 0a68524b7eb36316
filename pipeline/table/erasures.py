"""The erasures of a table, one JSON file each in its folder.

The file is written before anything is erased, so that a corpus that still holds the passage cannot
bring it back. Once all is gone it becomes the certificate. It holds salted hashes and no ids.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable
from typing import Any

from kalm_encoder.table.cache.erasures import ERASED
from kalm_encoder.table.location import Location
from pipeline.corpus.erased import ErasedIds
from pipeline.table.side_files import read_text, write_text


def erasures(table: Location) -> list[dict[str, Any]]:
    """Return the erasures of a table; `finished` of one that is under way is None."""
    session = table.file_session()
    return [json.loads(read_text(session, path)) for path in sorted(session.list(ERASED))]


def erased_ids(table: Location) -> ErasedIds:
    """Return the ids that may not come back to a table."""
    found = erasures(table)
    salt = found[0]["salt"] if found else ""
    return ErasedIds(salt, frozenset(hash for erasure in found for hash in erasure["ids"]))


def write_erasure(table: Location, erasure: dict[str, Any]) -> None:
    """Store an erasure under a name that stands for its ids, in place of what is there."""
    name = hashlib.sha256("".join(erasure["ids"]).encode()).hexdigest()[:16]
    text = json.dumps(erasure, indent=1) + "\n"
    write_text(table.file_session(), f"{ERASED}/{name}.json", text)


def begin_erasure(table: Location, ids: Iterable[str]) -> ErasedIds:
    """Record ids as erased, and return all that are."""
    known = erased_ids(table)
    salted = ErasedIds(known.salt or secrets.token_hex(16))
    hashes = sorted({salted.hash(id) for id in ids} - known.hashes)
    if hashes:
        write_erasure(table, {"salt": salted.salt, "ids": hashes, "finished": None})
    return ErasedIds(salted.salt, known.hashes.union(hashes))
