"""Smaller tables from bigger ones: the same rows, fewer bytes."""

import lance
import numpy as np
import pytest

from kalm_encoder import PassageTable, Reranker
from kalm_encoder.errors import IncompleteError, InputError
from pipeline.table.committer import Committer
from pipeline.upkeep.truncate import truncate
from pipeline.upkeep.verify import verify
from tests.conftest import encode_table, make_texts, write_corpus
from tests.golden import write

IDS = [f"p{i}" for i in range(60)]


def distance(a, b):
    """Return the relative L2 distance of two passages' states."""
    return np.linalg.norm(a.states.astype(np.float32) - b.states) / np.linalg.norm(b.states)


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
@pytest.mark.parametrize("ratios", [(2, 8), (4,), (16,)])
def test_states_are_those_of_the_source(small_table, tmp_path, ratios, dtype):
    target = str(tmp_path / "t.lance")
    summary = truncate(str(small_table), target, ratios=ratios, store_dtype=dtype, shard_size=25)
    assert (summary.num_rows, summary.live) == (60, True)
    source, made = PassageTable.open(str(small_table)), PassageTable.open(target)
    assert (made.spec.ratios, made.spec.store_dtype) == (ratios, dtype)
    assert made.spec.fingerprint == source.spec.fingerprint
    error = {"float16": 2.0**-11, "int8": 0.01, "int4": 0.12}[dtype]
    for ratio in ratios:
        for a, b in zip(made.take(IDS, ratio=ratio), source.take(IDS, ratio=ratio), strict=True):
            assert (a.num_tokens, a.truncated) == (b.num_tokens, b.truncated)
            assert distance(a, b) < error
    columns = ["id", "text", "text_hash"]
    rows = [t.dataset.to_table(columns=columns) for t in (source, made)]
    assert rows[0].equals(rows[1])
    assert verify(target).num_problems == 0


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_encoding_into_few_bits_equals_truncating(model_dir, small_table, tmp_path, dtype):
    """Both round the same float32 states."""
    corpus = write_corpus(tmp_path / "c.jsonl", make_texts(60))
    direct, made = tmp_path / "direct.lance", tmp_path / "made.lance"
    encode_table(model_dir, corpus, direct, ratios=(2, 8), store_dtype=dtype, shard_size=10)
    truncate(str(small_table), str(made), store_dtype=dtype)
    names = ["id", "num_tokens", "states_r2", "checksum_r2", "text_hash"]
    one, two = (
        lance.dataset(str(u), version="live").to_table(columns=names) for u in (direct, made)
    )
    assert one.equals(two)


def test_few_bits_made_from_fewer_are_as_exact(small_table, tmp_path):
    """int4 made from float16 or int8 is as near to the exact states as int4 made from them."""
    exact = PassageTable.open(str(small_table)).take(IDS, ratio=2)

    def error(*dtypes):
        source = str(small_table)
        for dtype in dtypes:
            source, last = str(tmp_path / f"{'-'.join(dtypes)}-{dtype}.lance"), source
            truncate(last, source, store_dtype=dtype)
        made = PassageTable.open(source).take(IDS, ratio=2)
        return np.mean([distance(a, b) for a, b in zip(made, exact, strict=True)])

    direct = error("int4")
    assert error("float16", "int4") < 1.01 * direct
    assert error("int8", "int4") < 1.05 * direct


def test_a_table_of_version_1_becomes_one_of_version_2(tmp_path):
    source = PassageTable.open(str(write.path_of(1, "int8")))
    truncate(source.uri, str(tmp_path / "t.lance"), ratios=(2,), store_dtype="int4")
    made = PassageTable.open(str(tmp_path / "t.lance"))
    assert (source.spec.format_version, made.spec.format_version) == (1, 2)
    for a, b in zip(made.take(write.IDS), source.take(write.IDS), strict=True):
        assert distance(a, b) < 0.2
    assert verify(made.uri).num_problems == 0


def test_scores_change_little(small_table, model_dir, tmp_path):
    exact = Reranker.open(str(small_table), model=str(model_dir)).rerank("query", IDS)
    scores = {r.id: r.score for r in exact}
    for dtype, most in (("float16", 1e-4), ("int8", 5e-3), ("int4", 5e-2)):
        truncate(str(small_table), str(tmp_path / f"{dtype}.lance"), store_dtype=dtype)
        table = Reranker.open(str(tmp_path / f"{dtype}.lance"), model=str(model_dir))
        results = table.rerank("query", IDS)
        assert max(abs(r.score - scores[r.id]) for r in results) < most, dtype


def test_an_interrupted_truncate_is_resumed(small_table, tmp_path, monkeypatch):
    target = str(tmp_path / "t.lance")
    real, calls = Committer.commit_if_due, []

    def dies(self):
        self.commit()
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(self)

    with monkeypatch.context() as broken:
        broken.setattr(Committer, "commit_if_due", dies)
        with pytest.raises(KeyboardInterrupt):
            truncate(str(small_table), target, ratios=(8,), shard_size=10)
    assert truncate(str(small_table), target, ratios=(8,), shard_size=10).shards_encoded == 4
    assert verify(target).num_problems == 0


def test_what_cannot_be_made_is_refused(small_table, tmp_path):
    with pytest.raises(InputError, match="ratio 3 is not a multiple"):
        truncate(str(small_table), str(tmp_path / "t.lance"), ratios=(3,))
    with pytest.raises(InputError, match="give another --ratios"):
        truncate(str(small_table), str(tmp_path / "t.lance"))
    with pytest.raises(InputError, match="into itself"):
        truncate(str(small_table), str(small_table), ratios=(8,))


def test_damage_is_not_passed_on(model_dir, tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", make_texts(10))
    encode_table(model_dir, corpus, tmp_path / "s.lance")
    states = PassageTable.open(str(tmp_path / "s.lance")).take(["p0"])[0].states
    (file,) = (tmp_path / "s.lance" / "data").glob("*.lance")
    raw = file.read_bytes()
    at = raw.index(states[0].tobytes())
    file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    source, target = str(tmp_path / "s.lance"), str(tmp_path / "t.lance")
    with pytest.raises(IncompleteError, match=r"1 of 5 shards failed.*\n.*row 'p0' of"):
        truncate(source, target, store_dtype="int8", shard_size=2)
    others = lance.dataset(target).to_table(columns=["id"])["id"].to_pylist()
    assert sorted(others) == [f"p{i}" for i in range(2, 10)]
