import shutil

import pytest

from kalm_encoder import PassageTable, Reranker
from kalm_encoder.errors import InputError, MismatchError, MissingIdsError
from kalm_encoder.rerank import check_match

IDS = [f"p{i}" for i in range(60)]


@pytest.fixture(scope="module")
def reranker(small_table):
    return Reranker.open(str(small_table))


def test_best_first_and_independent_of_candidates(reranker):
    results = reranker.rerank("token state", IDS)
    assert [r.score for r in results] == sorted((r.score for r in results), reverse=True)
    assert len(results) == 60
    scores = {r.id: r.score for r in results}
    for result in reranker.rerank("token state", IDS[10:20][::-1]):
        assert abs(result.score - scores[result.id]) <= 1e-5
    assert reranker.rerank("token state", IDS, top_k=3) == results[:3]


def test_repeated_candidates_are_scored_once(reranker):
    assert len(reranker.rerank("q", ["p1", "p1", "p2"])) == 2
    assert reranker.rerank("q", []) == []


def test_ties_are_broken_by_id(reranker, monkeypatch):
    monkeypatch.setattr(reranker.decoder, "score", lambda q, s, **_: [(0.5, 0.0)] * len(s))
    assert [r.id for r in reranker.rerank("q", ["p3", "p1", "p2"])] == ["p1", "p2", "p3"]


def test_bad_requests_are_named(reranker):
    with pytest.raises(MissingIdsError, match="'nope'"):
        reranker.rerank("q", ["p1", "nope"])
    with pytest.raises(InputError, match="top_k 0"):
        reranker.rerank("q", ["p1"], top_k=0)


def test_another_model_is_refused_with_both_fingerprints(small_table, model_dir, tmp_path):
    other = shutil.copytree(model_dir, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    with pytest.raises(MismatchError, match=r"fingerprint .* load the model the table") as caught:
        Reranker.open(str(small_table), model=str(other))
    assert caught.value.field == "fingerprint"


def test_a_moved_but_equal_model_is_accepted(small_table, model_dir, tmp_path):
    moved = shutil.copytree(model_dir, tmp_path / "moved")
    assert Reranker.open(str(small_table), model=str(moved)).rerank("q", ["p1"])


@pytest.mark.parametrize(
    ("field", "value"),
    [("template", "{passage}"), ("format_version", 0), ("dim", 64), ("fingerprint", "x")],
)
def test_every_recorded_property_is_compared(small_table, decoder, field, value):
    table = PassageTable.open(str(small_table))
    object.__setattr__(table.spec, field, value)
    with pytest.raises(MismatchError, match=f"has {field} ") as caught:
        check_match(table, decoder)
    assert caught.value.field == field


def test_another_max_length_is_refused(small_table):
    assert Reranker.open(str(small_table), max_length=1024)
    with pytest.raises(MismatchError, match="max_length 1024, the query side 512"):
        Reranker.open(str(small_table), max_length=512)
