"""Which tables the explore page compares, and which ratios and cascades it offers of each."""

from __future__ import annotations

from collections.abc import Sequence

from kalm_encoder import PassageTable
from kalm_encoder.errors import InputError
from kalm_encoder.table.spec import TableSpec

COARSEST = 128
"""The coarsest ratio of the paper; the page offers none beyond it."""


def open_tables(
    uris: Sequence[str], storage_options: dict[str, str] | None = None
) -> dict[str, PassageTable]:
    """Open tables of one corpus and model, named by what tells them apart: dtype, then ratios.

    Raises:
        TableError: one is not there, or not complete.
        InputError: one stores no text, has another model than the first, or equals another.
    """
    opened = [PassageTable.open(uri, storage_options=storage_options) for uri in uris]
    specs = [table.spec for table in opened]
    alike = len({spec.store_dtype for spec in specs}) < len(specs)
    named: dict[str, PassageTable] = {}
    for table in opened:
        _check(table, opened[0])
        name = _name(table.spec, with_ratios=alike)
        if name in named:
            raise InputError(
                f"{named[name].uri} and {table.uri} both store {name}: give one of them"
            )
        named[name] = table
    return named


def _check(table: PassageTable, first: PassageTable) -> None:
    if not table.spec.keep_text:
        raise InputError(f"{table.uri} stores no text to search and show: encode without --no-text")
    for field in ("fingerprint", "template", "dim"):
        one, other = getattr(first.spec, field), getattr(table.spec, field)
        if one != other:
            raise InputError(
                f"{first.uri} has {field} {one!r}, {table.uri} {other!r}: give tables of one "
                "model, such as `kalm truncate` makes"
            )


def _name(spec: TableSpec, *, with_ratios: bool) -> str:
    ratios = f" at {', '.join(map(str, spec.ratios))}" if with_ratios else ""
    return spec.store_dtype + ratios


def ratio_steps(stored: Sequence[int]) -> list[int]:
    """Return the ratios the page's slider stops at: the stored ones and doublings of the finest.

    Example: stored 4 and 32 give 4, 8, 16, 32, 64, 128.
    """
    doublings = (stored[0] << n for n in range(COARSEST.bit_length()))
    return sorted({*stored, *(r for r in doublings if r <= COARSEST)})


def cascades(stored: Sequence[int]) -> list[list[tuple[int, int | None]]]:
    """Return sensible cascades: coarse for all, the finest ratio for the best 10 or 20.

    Coarse is the coarsest stored ratio, or 8 times the finest if that is more; where 4 times coarse
    is still offered, it goes before both.

    Example: stored 4 and 32 give 32:10,4 and 32:20,4 and 128:50,32:20,4; 128 alone gives none.
    """
    fine = stored[0]
    coarser = [r for r in ratio_steps(stored) if fine < r <= max(stored[-1], 8 * fine)]
    if not coarser:
        return []
    coarse = coarser[-1]
    made: list[list[tuple[int, int | None]]] = [[(coarse, keep), (fine, None)] for keep in (10, 20)]
    if 4 * coarse <= COARSEST:
        made.append([(4 * coarse, 50), (coarse, 20), (fine, None)])
    return made
