"""A join of a corpus and a table by hashes says what dictionaries of ids and texts say."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.table.partitions import HIGH, hashes_of
from pipeline.upkeep.comparison.join import BEGIN, ID, METADATA, PLACE, ROW, TEXT, join

PARTITIONS = 3
small = st.integers(0, 4)
passage = st.tuples(st.sampled_from("abcdefgh"), small, small)
"""An id, and what stands for its text and its metadata."""


def side(keys, ids, texts, sums, **columns):
    """Return a side of a join; the keys are the documents where there are some."""
    made = {
        **hashes_of(keys),
        **dict(zip(ID, hashes_of(ids).values(), strict=True)),
        **dict(zip(TEXT, hashes_of([str(text) for text in texts]).values(), strict=True)),
        METADATA: pa.array(sums, pa.uint64()),
        **{name: pa.array(values, pa.int64()) for name, values in columns.items()},
    }
    return pa.table(made)


def joined(corpus, table, keep):
    """Join partition by partition; return places, row ids and counts by what is to be done."""
    found, digest = Counter(), 0
    to = {"encode": [], "update": [], "missing": [], "surplus": []}
    for number in range(PARTITIONS):
        one, other = (
            rows.filter(pa.array(rows[HIGH].to_numpy() % np.uint64(PARTITIONS) == number))
            for rows in (corpus, table)
        )
        made = join(one, other, keep)
        row_ids = other[ROW].to_numpy()
        to["encode"] += made.to_encode.tolist()
        to["update"] += zip(made.to_update.tolist(), made.held_as.tolist(), strict=True)
        to["missing"] += row_ids[made.missing].tolist()
        to["surplus"] += row_ids[made.surplus].tolist()
        found += Counter(new=made.num_new, unchanged=made.unchanged, repeated=made.num_repeated)
        digest += made.encode_digest
    whole = join(corpus, table, keep)
    assert digest % (1 << 128) == whole.encode_digest
    assert sorted(to["encode"]) == whole.to_encode.tolist()
    return {name: sorted(values) for name, values in to.items()}, +found


@pytest.mark.parametrize("keep", ["first", "last"])
@pytest.mark.parametrize("has_metadata", [True, False])
@given(st.lists(passage), st.lists(passage, unique_by=lambda row: row[0]), st.randoms())
def test_passages(keep, has_metadata, corpus, table, random):
    rows = [(*row, place) for place, row in enumerate(corpus)]
    random.shuffle(rows)
    ids, texts, sums, places = zip(*rows, strict=True) if rows else [()] * 4
    left = side(ids, ids, texts, sums, **{PLACE: places})
    ids, texts, sums = zip(*table, strict=True) if table else [()] * 3
    right = side(ids, ids, texts, sums, **{ROW: range(100, 100 + len(ids))})
    dropped = [*ID] if has_metadata else [*ID, METADATA]
    to, found = joined(left.drop_columns(dropped), right.drop_columns(dropped), keep)

    held = {id: (text, metadata, 100 + i) for i, (id, text, metadata) in enumerate(table)}
    ordered = list(enumerate(corpus))
    kept = {row[0]: (place, *row[1:]) for place, row in ordered[:: -1 if keep == "first" else 1]}
    encode, update, count = [], [], Counter(repeated=len(corpus) - len(kept))
    for id, (place, text, metadata) in kept.items():
        was = held.get(id, (None, None, None))
        if was[0] != text:
            encode.append(place)
            count["new"] += id not in held
        elif has_metadata and was[1] != metadata:
            update.append((place, was[2]))
        else:
            count["unchanged"] += 1
    missing = sorted(row for id, (_, _, row) in held.items() if id not in kept)
    expected = {
        "encode": sorted(encode), "update": sorted(update), "missing": missing, "surplus": [],
    }  # fmt: skip
    assert (to, found) == (expected, +count)


document = st.lists(small, min_size=1, max_size=5)
"""What stands for the texts of its passages."""


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), document), max_size=6),
    st.dictionaries(st.sampled_from("abcd"), document),
)
def test_passages_of_documents(corpus, table):
    """A text under another number of its document moves; the first of two documents counts."""
    left, kept = [], {}
    for name, texts in corpus:
        begin = len(left)
        left += [(name, f"{name}#{k}", text, k, begin + k, begin) for k, text in enumerate(texts)]
        kept.setdefault(name, (begin, texts))
    right = [
        (name, f"{name}#{k}", text, k) for name, texts in table.items()
        for k, text in enumerate(texts)
    ]  # fmt: skip
    held = {id: (100 + row, text) for row, (_, id, text, _) in enumerate(right)}
    names = [row[0] for row in left], [row[0] for row in right]
    *facts, places, begins = zip(*left, strict=True) if left else [()] * 6
    one = side(*facts, **{PLACE: places, BEGIN: begins})
    facts = zip(*right, strict=True) if right else [()] * 4
    to, found = joined(one, side(*facts, **{ROW: range(100, 100 + len(right))}), "first")

    encode, update, surplus, count = [], [], [], Counter()
    for name, (begin, texts) in kept.items():
        old = table.get(name, [])
        for k, text in enumerate(texts):
            if k < len(old) and old[k] == text:
                count["unchanged"] += 1
            elif text in old:
                last = max(i for i, other in enumerate(old) if other == text)
                update.append((begin + k, held[f"{name}#{last}"][0]))
            else:
                encode.append(begin + k)
                count["new"] += k >= len(old)
        surplus += [held[f"{name}#{k}"][0] for k in range(len(texts), len(old))]
    missing = [held[id][0] for name, id, _, _ in right if name not in kept]
    count["repeated"] = len(left) - sum(len(texts) for _, texts in kept.values())
    expected = {"encode": encode, "update": update, "missing": missing, "surplus": surplus}
    assert to == {name: sorted(values) for name, values in expected.items()}
    assert found == +count
    assert set(names[0]) >= set(kept)
