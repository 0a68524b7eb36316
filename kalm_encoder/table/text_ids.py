"""Finds the ids of stored texts, and remembers those that it found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kalm_encoder.errors import InputError
from kalm_encoder.table.checksums import text_hash
from kalm_encoder.table.row_index import ADDRESS, TextOrder

REMEMBERED_TEXTS = 1 << 16
"""Number of texts that are known without reading; then all are forgotten at once."""

Scan = Callable[[list[str], str], pa.Table]
"""Reads columns of those rows of a version that satisfy a predicate."""


class TextIds:
    """The texts of one version of a table, or of some of its rows. Threads may share it.

    Args:
        order: The rows in the order of their texts.
    """

    def __init__(self, order: TextOrder) -> None:
        self._order = order
        self._remembered: dict[bytes, str] = {}

    def only(self, addresses: NDArray[np.uint64]) -> TextIds:
        """Return the texts of those rows that have one of these addresses, as if all were."""
        return TextIds(self._order.only(addresses))

    @property
    def nbytes(self) -> int:
        """Number of bytes held beside the index."""
        return self._order.nbytes

    def find(self, texts: Iterable[str], scan: Scan) -> dict[str, str]:
        """Return ids by text, as `PassageTable.ids_by_text` does.

        Raises:
            InputError: If a text is not valid Unicode.
        """
        try:
            hashes = {text: text_hash(text) for text in texts}
        except UnicodeEncodeError as error:
            shown = repr(error.object[:80])
            raise InputError(f"the text {shown} is not valid Unicode: no table holds it") from None
        known, order = self._remembered, self._order
        ids = {key: known[key] for key in hashes.values() if key in known}
        rows = order.find([key for key in dict.fromkeys(hashes.values()) if key not in ids])
        read = _confirmed({key: order.at(rows[key][:1]) for key in rows}, scan)
        # Other rows are read only if the first one has another text with the same first half.
        left = rows.keys() - read.keys()
        read |= _confirmed({key: order.at(rows[key][1:]) for key in left}, scan)
        if len(known) + len(read) > REMEMBERED_TEXTS:
            known = self._remembered = {}
        known.update(read)
        ids |= read
        return {text: ids[key] for text, key in hashes.items() if key in ids}


def _confirmed(rows: Mapping[bytes, NDArray[np.uint64]], scan: Scan) -> dict[bytes, str]:
    """Return by text hash the id of the first row at its addresses that has all 16 bytes."""
    if not (places := [(key, at) for key, found in rows.items() for at in found.tolist()]):
        return {}
    wanted = f"{ADDRESS} IN ({', '.join(str(at) for _, at in places)})"
    read = scan(["id", "text_hash", ADDRESS], wanted)
    ids, hashes, addresses = (read[name].to_pylist() for name in ("id", "text_hash", ADDRESS))
    held = dict(zip(addresses, zip(hashes, ids, strict=True), strict=True))
    confirmed: dict[bytes, str] = {}
    for key, at in places:
        if held[at][0] == key:
            confirmed.setdefault(key, held[at][1])
    return confirmed
