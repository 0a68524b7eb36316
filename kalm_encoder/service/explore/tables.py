"""The tables that the explore page compares, and the ratios and cascades it offers for each."""

from __future__ import annotations

from collections.abc import Sequence

from kalm_encoder import PassageTable
from kalm_encoder.errors import InputError

COARSEST_RATIO = 128
"""The coarsest ratio of the paper, and the coarsest that the page offers."""


def open_tables(
    uris: Sequence[str], storage_options: dict[str, str] | None = None
) -> dict[str, PassageTable]:
    """Open tables of one corpus and model, named by what tells them apart: dtype, then ratios.

    Raises:
        TableError: One of them is not there, or not complete.
        InputError: One of them stores no text, has another model than the first, or stores the same
            as another one.
    """
    tables = [PassageTable.open(uri, storage_options=storage_options) for uri in uris]
    with_ratios = len({table.spec.store_dtype for table in tables}) < len(tables)
    named: dict[str, PassageTable] = {}
    for table in tables:
        if not table.spec.keep_text:
            raise InputError(
                f"{table.uri} stores no text to search and show: encode without --no-text"
            )
        for field in ("fingerprint", "template", "dim"):
            one, other = getattr(tables[0].spec, field), getattr(table.spec, field)
            if one != other:
                raise InputError(
                    f"{tables[0].uri} has {field} {one!r}, {table.uri} has {other!r}: give tables "
                    "of one model, such as `kalm truncate` makes"
                )
        ratios = f" at {', '.join(map(str, table.spec.ratios))}" if with_ratios else ""
        name = table.spec.store_dtype + ratios
        if name in named:
            raise InputError(
                f"{named[name].uri} and {table.uri} both store {name}: give one of them"
            )
        named[name] = table
    return named


def ratio_steps(stored: Sequence[int]) -> list[int]:
    """Return the ratios of the slider: the stored ones, and the finest one doubled repeatedly.

    Example: stored 4 and 32 give 4, 8, 16, 32, 64, 128.
    """
    doublings = (stored[0] << n for n in range(COARSEST_RATIO.bit_length()))
    return sorted({*stored, *(r for r in doublings if r <= COARSEST_RATIO)})


def cascades(stored: Sequence[int]) -> list[list[tuple[int, int | None]]]:
    """Return sensible cascades: a coarse ratio for all, the finest for the best 10 or 20.

    Coarse is the coarsest stored ratio, or 8 times the finest if that is more. If the page offers 4
    times the coarse ratio, a third cascade scores all passages with it first.

    Example: stored 4 and 32 give 32:10,4 and 32:20,4 and 128:50,32:20,4; 128 alone gives none.
    """
    fine = stored[0]
    coarser = [r for r in ratio_steps(stored) if fine < r <= max(stored[-1], 8 * fine)]
    if not coarser:
        return []
    coarse = coarser[-1]
    made: list[list[tuple[int, int | None]]] = [[(coarse, keep), (fine, None)] for keep in (10, 20)]
    if 4 * coarse <= COARSEST_RATIO:
        made.append([(4 * coarse, 50), (coarse, 20), (fine, None)])
    return made
