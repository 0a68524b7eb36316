import json

import lance
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_encoder import PassageTable
from kalm_encoder.errors import CorruptRowError, InputError, TableError
from kalm_encoder.matryoshka import PackedStates, PassageStates, coarsen, num_groups
from kalm_encoder.table.checksums import states_checksum
from kalm_encoder.table.rows import build_rows, read_rows
from kalm_encoder.table.spec import TableSpec
from tests.golden import reader, write

SPEC = TableSpec("m", None, "f", dim=4, max_length=64, ratios=(2, 8), store_dtype="float32")


def columns(ratio):
    return ["id", "num_tokens", "truncated", f"states_r{ratio}", f"checksum_r{ratio}"]


@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=20),
    slice_at=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(lengths, slice_at, seed):
    rng = np.random.default_rng(seed)
    passages = [
        PassageStates(rng.standard_normal((num_groups(n, 2), 4)).astype(np.float32), n, bool(n % 2))
        for n in lengths
    ]
    ids = [f"id{i}" for i in range(len(lengths))]
    rows = build_rows(SPEC, ids, ids, PackedStates.of(passages), "s").slice(slice_at)
    for ratio in (2, 8):
        for wanted in (ratio, ratio * 2):
            got = read_rows(SPEC, rows.select(columns(ratio)), wanted, uri="u")
            assert list(got) == ids[slice_at:]
            for i, passage in list(zip(ids, passages, strict=True))[slice_at:]:
                assert (got[i].num_tokens, got[i].truncated) == (
                    passage.num_tokens,
                    passage.truncated,
                )
                want = coarsen(passage.states, passage.num_tokens, 2, wanted)
                if wanted == 2:
                    assert np.array_equal(got[i].states, want)
                np.testing.assert_allclose(got[i].states, want, atol=1e-6)


def test_no_field_is_nullable():
    def walk(field: pa.Field):
        assert not field.nullable, field
        if pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type):
            walk(field.type.value_field)

    for field in SPEC.schema():
        walk(field)


def test_checksum_covers_id_tokens_and_states():
    states = np.arange(8, dtype=np.float16).reshape(2, 4)
    base = states_checksum("id", 4, False, states)
    changed = states.copy()
    changed[1, 3] = np.float16(np.nextafter(states[1, 3], np.float16(100)))
    assert base == states_checksum("id", 4, False, states.copy())
    assert (
        len(
            {
                base,
                states_checksum("ie", 4, False, states),
                states_checksum("id", 3, False, states),
                states_checksum("id", 4, True, states),
            }
        )
        == 4
    )
    assert states_checksum("id", 4, False, changed) != base


def test_repeated_ids_are_an_error():
    passage = PassageStates(np.ones((1, 4), np.float32), 2, False)
    rows = build_rows(SPEC, ["a", "a"], ["", ""], PackedStates.of([passage] * 2), "s")
    rows = rows.select(columns(2))
    with pytest.raises(CorruptRowError, match="'a' is in u more than once"):
        read_rows(SPEC, rows, 2, uri="u")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": (4, 6)}, "ratio 6 is not a multiple of the finest ratio 4"),
        ({"ratios": (8, 4)}, "finest first"),
        ({"ratios": ()}, "finest first"),
        ({"store_dtype": "int3"}, "'int3' is not one of float16, float32"),
    ],
)
def test_impossible_settings_are_named(change, message):
    with pytest.raises(InputError, match=message):
        TableSpec(**{**SPEC.__dict__, **change})


GOLDEN = [(version, dtype) for version in write.VERSIONS for dtype in write.FILES]


@pytest.mark.parametrize(("version", "dtype"), GOLDEN)
def test_golden_files_read_as_written_and_as_documented(version, dtype):
    """A reader that knows the documentation alone finds the same states."""
    path = write.path_of(version, dtype)
    table = PassageTable.open(str(path))
    assert table.spec == write.spec_of(version, dtype)
    written = write.passages(version)
    error = {"float16": 1e-3, "int8": 0.01, "int4": 0.12}[dtype]
    for ratio in (2, 4, 8):
        taken = table.take(write.IDS, ratio=ratio)
        for got, passage in zip(taken, written, strict=True):
            assert (got.num_tokens, got.truncated) == (passage.num_tokens, passage.truncated)
            want = coarsen(passage.states, passage.num_tokens, 2, ratio)
            assert np.linalg.norm(got.states - want) <= error * np.linalg.norm(want)
        if ratio in table.spec.ratios:
            documented = reader.read(path, ratio)
            for id, got in zip(write.IDS, taken, strict=True):
                np.testing.assert_allclose(documented[id], got.states, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("version", "dtype"), GOLDEN)
def test_golden_files_are_still_written_the_same(version, dtype):
    rows = write.rows_of(version, dtype)
    path = write.path_of(version, dtype)
    # Not Table.equals: Lance does not keep the nullability of fixed-size-list items.
    stored = lance.dataset(path).to_table()
    assert rows.to_pydict() == stored.to_pydict()
    expected = json.loads(path.with_suffix(".json").read_text())
    assert [h.hex() for h in rows["text_hash"].to_pylist()] == expected["text_hash"]
    for column in ("checksum_r2", "checksum_r4", "checksum"):
        assert rows[column].to_pylist() == expected[column]


def test_other_tables_and_versions_are_refused(tmp_path):
    lance.write_dataset(pa.table({"id": ["a"]}), tmp_path / "other.lance")
    with pytest.raises(TableError, match="not one that `kalm encode` made"):
        PassageTable.open(str(tmp_path / "other.lance"), version=1)
    newer = json.dumps({"format_version": 3, "library_version": "9.0"})
    schema = pa.schema([pa.field("id", pa.string())], metadata={"kalm.spec": newer})
    lance.write_dataset(schema.empty_table(), tmp_path / "newer.lance", schema=schema)
    with pytest.raises(TableError, match=r"format version 3.*Install the version.*9\.0"):
        PassageTable.open(str(tmp_path / "newer.lance"), version=1)
