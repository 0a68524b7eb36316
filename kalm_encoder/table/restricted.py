"""The rows of a table that satisfy a predicate, as a table of their own.

Whoever holds such a table cannot tell an id that the predicate hides from one that is not there.
Ids are compared with hashes that were made when it was opened, before anything is looked up, so
that both take the same path and the same time. Texts are looked up among the visible rows alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from kalm_encoder.errors import InputError, first_line
from kalm_encoder.table.ids import Id, as_ids
from kalm_encoder.table.reader import PassageTable
from kalm_encoder.table.row_index import ADDRESS


class RestrictedTable(PassageTable):
    """A handle of the same version that has only some of the rows; it takes 8 bytes for each.

    It takes 4 bytes more for each if the table finds rows by their texts.

    Args:
        table: The open table, whose index and disk cache serve here too.
        where: SQL predicate over its columns. It is not checked here.

    Raises:
        InputError: If Lance cannot apply the predicate to the columns of this table.
    """

    def __init__(self, table: PassageTable, where: str) -> None:
        super().__init__(table.uri, table.dataset)
        self.index = table.index
        self.cached = table.cached
        self.where = where
        # Whoever may write passages could choose an id with the hash of a hidden one. Without this
        # secret nobody can.
        self._secret = os.urandom(16)
        self._found = {"id": self._values(where, "id")}
        if table.by_text is not None:
            rows = self._scan([ADDRESS], where, where=where)
            self.by_text = table.by_text.only(rows[ADDRESS].to_numpy())

    def __len__(self) -> int:
        return len(self._found["id"])

    def _visible(self, ids: Sequence[Id], column: str = "id") -> list[str]:
        if column not in self._found:  # the ids of documents, when they are asked for first
            self._found[column] = self._values(self.where, column)
        found, wanted = self._found[column], as_ids(ids)
        hashes = self._hashes(wanted)
        is_there = np.searchsorted(found, hashes, side="right") > np.searchsorted(found, hashes)
        return [wanted[i] for i in np.flatnonzero(is_there).tolist()]

    def _values(self, where: str | None, column: str) -> NDArray[np.uint64]:
        """Return the sorted hashes of the values that a column has in these rows."""
        found = [np.empty(0, np.uint64)]
        try:
            for batch in self.dataset.scanner(columns=[column], filter=where).to_batches():
                found.append(self._hashes(batch[column].drop_null().to_pylist()))
        except (OSError, ValueError) as error:
            raise InputError(f"the filter {where!r} is refused: {first_line(error)}") from error
        return np.sort(np.concatenate(found))

    def _hashes(self, ids: Iterable[str]) -> NDArray[np.uint64]:
        digests = (blake2b(id.encode(), digest_size=8, key=self._secret).digest() for id in ids)
        return np.frombuffer(b"".join(digests), np.uint64)
