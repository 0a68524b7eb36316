"""Ids that were erased from a table and may not come back, known only by their salted hashes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

ERASED_REASON = "the passage was erased from this table"
"""Reason of the reject that stands for such a row; the reject does not name the id."""


@dataclass(frozen=True)
class ErasedIds:
    """The erased ids of one table.

    Attributes:
        salt: Salt of the hashes in hex, up to 64 bytes; "" if nothing was ever erased.
        hashes: Hash of each id, in hex.
    """

    salt: str = ""
    hashes: frozenset[str] = field(default_factory=frozenset, repr=False)

    def __contains__(self, id: str) -> bool:
        return bool(self.hashes) and self.hash(id) in self.hashes

    def hash(self, id: str) -> str:
        """Return the salted hash of an id: 16 bytes of BLAKE2b, in hex."""
        key = bytes.fromhex(self.salt)
        return hashlib.blake2b(id.encode(), key=key, digest_size=16).hexdigest()


NONE_ERASED = ErasedIds()
