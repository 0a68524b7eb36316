"""Which passages a request means: ids of any kind, ids that are missing, passages with one text."""

import math
import random

import numpy as np
import pyarrow as pa
import pytest

from kalm_encoder import PassageTable, Reranker
from kalm_encoder.errors import InputError, MissingIdsError
from tests.conftest import encode_table, make_texts, write_corpus

COPIES = 12


@pytest.fixture(scope="module")
def numbered(model_dir, tmp_path_factory):
    """40 passages with integer ids; 12 of them, in all shards, have one text."""
    folder = tmp_path_factory.mktemp("numbered")
    texts = make_texts(40, seed=5, longest=200)
    for place in range(0, 3 * COPIES, 3):
        texts[place] = "states are stored once and read often"
    lines = [f'{{"id": {n}, "text": "{text}"}}' for n, text in enumerate(texts)]
    (folder / "c.jsonl").write_text("\n".join(lines), encoding="utf-8")
    uri = folder / "t.lance"
    encode_table(model_dir, folder / "c.jsonl", uri, store_dtype="float32", shard_size=4)
    return uri


@pytest.fixture(scope="module")
def reranker(numbered):
    return Reranker.open(str(numbered))


def same(results, wanted):
    """The same ranking; in other company the last bits of a score differ."""
    assert [(r.id, r.ratio) for r in results] == [(r.id, r.ratio) for r in wanted]
    assert [r.score for r in results] == pytest.approx([r.score for r in wanted], abs=1e-5)


@pytest.mark.parametrize("index_bytes", [0, 1 << 20])
def test_an_integer_id_is_its_decimal_string(numbered, index_bytes):
    reranker = Reranker.open(str(numbered), index_bytes=index_bytes)
    assert (reranker.table.index is not None) == bool(index_bytes)
    strings = reranker.rerank("token state", ["7", "1", "30"])
    for ids in ([7, 1, 30], np.array([7, 1, 30]), [7, "1", np.int32(30)], [7, 1, 30, "7", "30"]):
        assert reranker.rerank("token state", ids) == strings
    table = reranker.table
    assert table.known([7, "8", 99]) == {"7", "8"}
    assert table.texts([7]) == table.texts(["7"]) != {}
    assert table.lengths([7]) == table.lengths(["7"]) != {}
    assert (table.take([7])[0].states == table.take(["7"])[0].states).all()
    fine = table.take([5])[0]
    given = reranker.rerank("q", [7], passages={7: fine})
    assert given[0].score == pytest.approx(reranker.rerank("q", [5])[0].score, abs=1e-6)


@pytest.mark.parametrize(
    "bad", [[1.0], [None], [True], [b"7"], [["7"]], list(pa.array(["7"])), [np.float32(7)]]
)
def test_what_is_no_id_is_named(reranker, bad):
    with pytest.raises(InputError, match="is not an id: give a string or an integer"):
        reranker.rerank("q", ["7", *bad])
    assert reranker.rerank("q", ["7", 7])  # the remedy


def test_one_string_is_not_a_list_of_ids(reranker):
    with pytest.raises(InputError, match=r"one string, '17': give a list of ids, such as \['17'\]"):
        reranker.rerank("q", "17")
    with pytest.raises(InputError, match="one string"):
        reranker.table.take("17")
    with pytest.raises(InputError, match="not valid Unicode"):
        reranker.rerank("q", ["\ud800"])


@pytest.mark.parametrize("how", [{}, {"index_bytes": 1 << 20}, {"hot_bytes": 1 << 27}])
def test_passages_with_one_text_score_once_and_tie_by_position(numbered, monkeypatch, how):
    reranker = Reranker.open(str(numbered), **how)
    monkeypatch.setattr("kalm_encoder.rerank.reranker.CHUNK_CANDIDATES", 5)
    scored = []
    score_pairs = reranker.decoder.score_pairs
    reranker._score_pairs = lambda pairs: (scored.extend(pairs), score_pairs(pairs))[1]
    copies = {str(place) for place in range(0, 3 * COPIES, 3)}
    for seed in range(3):  # with hot passages: cold, then recalled
        ids = [str(n) for n in range(40)]
        random.Random(seed).shuffle(ids)
        scored.clear()
        results = reranker.rerank("states are stored", ids, ratio=4)
        assert len(scored) == len(set(reranker.table.texts(ids).values())) <= 40 - COPIES + 1
        tied = [r for r in results if r.id in copies]
        assert len({(r.score, r.margin) for r in tied}) == 1
        assert [r.id for r in tied] == [i for i in ids if i in copies]
    staged = reranker.rerank("states are stored", ids, cascade=[(8, 20), (4, None)])
    tied = [r for r in staged if r.id in copies and r.ratio == 4]
    assert [r.id for r in tied] == [i for i in ids if i in copies][: len(tied)]


@pytest.mark.parametrize("index_bytes", [0, 1 << 20])
def test_missing_ids_are_an_error_or_left_out_or_last(numbered, monkeypatch, index_bytes):
    reranker = Reranker.open(str(numbered), index_bytes=index_bytes)
    monkeypatch.setattr("kalm_encoder.rerank.reranker.CHUNK_CANDIDATES", 3)
    ids = ["x1", "3", "4", 777, "5", "6", "x0", "8"]
    there = [i for i in ids if i not in ("x1", 777, "x0")]
    want = reranker.rerank("q", there)
    with pytest.raises(MissingIdsError, match=r"on_missing='drop'.*on_missing='last'") as caught:
        reranker.rerank("q", ids)
    assert caught.value.ids == ["x1", "777", "x0"], "all of them, whatever chunk they are in"
    same(reranker.rerank("q", ids, on_missing="drop"), want)
    last = reranker.rerank("q", ids, on_missing="last")
    same(last[: len(want)], want)
    assert [r.id for r in last[len(want) :]] == ["x1", "777", "x0"]
    for result in last[len(want) :]:
        assert (result.score, result.margin, result.ratio) == (0.0, -math.inf, None)
    assert reranker.rerank("q", ids, on_missing="last", top_k=6) == last[:6]
    assert reranker.rerank("q", ["x", "y"], on_missing="drop") == []
    for how in ({"cascade": [(8, 2), (4, None)]}, {"max_ms": 60_000}):
        staged = reranker.rerank("q", ids, on_missing="last", **how)
        same(staged[: len(there)], reranker.rerank("q", there, **how))
        assert [r.ratio for r in staged[len(there) :]] == [None] * 3
    with pytest.raises(InputError, match="on_missing 'ignore' must be error, drop or last"):
        reranker.rerank("q", ids, on_missing="ignore")


def test_given_states_are_never_missing(reranker):
    fine = reranker.table.take([5])[0]
    assert [r.id for r in reranker.rerank("q", ["new"], passages={"new": fine})] == ["new"]
    with pytest.raises(MissingIdsError) as caught:
        reranker.rerank("q", ["new", "x"], passages={"new": fine})
    assert caught.value.ids == ["x"]


def test_a_table_of_before_is_ranked_too(model_dir, tmp_path):
    """Reading needs the text hash, which every table of this format has."""
    uri = tmp_path / "t.lance"
    corpus = write_corpus(tmp_path / "c.jsonl", ["a", "a", "b"])
    encode_table(model_dir, corpus, uri, keep_text=False, store_dtype="int8")
    assert [p.content for p in PassageTable.open(str(uri)).take(["p0", "p1"])].count(None) == 0
    first, second = (r.score for r in Reranker.open(str(uri)).rerank("q", ["p0", "p1"]))
    assert first == second
