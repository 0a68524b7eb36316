"""Looks texts up in a table of a million rows of random states.

A look-up reads the ids and the text hashes of the rows that it finds, and nothing if it finds none.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.bench.data import bar, spread, timed
from tests.bench.take import INDEX_LIMIT_BYTES, LARGE, open_table, random_table

LOOK_UPS, TEXTS = 100, 100


def main() -> list[str]:
    table = open_table(random_table(LARGE, dim=64, states=8), indexed=False)
    seconds = timed(lambda: table.load_index(INDEX_LIMIT_BYTES, match_text=True))
    index, order = table.index, table.by_text
    assert index is not None and order is not None
    print(f"index of {LARGE:,} rows: {index.nbytes / LARGE:.1f} bytes per row, and "
          f"{order.nbytes / LARGE:.1f} for texts; {seconds:.1f} s")  # fmt: skip
    rng = random.Random(0)
    drawn = [rng.sample(range(LARGE), TEXTS) for _ in range(LOOK_UPS + 5)]
    stored = [[f"doc-{n}" for n in numbers] for numbers in drawn]  # their texts are their ids
    assert table.ids_by_text(stored[0]) == {text: text for text in stored[0]}
    missing = [[f"other {n}" for n in numbers] for numbers in drawn]
    what: dict[str, Callable[[int], object]] = {
        "stored texts looked up": lambda i: table.ids_by_text(stored[i]),
        "other texts looked up": lambda i: table.ids_by_text(missing[i]),
        "rows read by id": lambda i: table.take(stored[i]),
    }
    took: dict[str, list[float]] = {name: [] for name in what}
    for i in range(len(drawn)):
        for name in rng.sample(list(what), len(what)):
            took[name].append(1000 * timed(lambda name=name, i=i: what[name](i)))
    for name, times in took.items():
        print(f"{TEXTS} {name}, of {LARGE:,} rows: {spread(times[5:])} ms")  # the first ones warm
    return [bar("match_text_bytes_per_row", order.nbytes / LARGE, "<=", 4)]
