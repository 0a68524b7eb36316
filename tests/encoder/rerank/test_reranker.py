import json
import shutil

import pytest

from kalm_encoder import PassageTable, Reranker
from kalm_encoder.errors import InputError, MismatchError, MissingIdsError
from kalm_encoder.rerank.match import check_match

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


def test_ties_keep_the_order_of_the_request(reranker, monkeypatch):
    monkeypatch.setattr(reranker.decoder, "score_pairs", lambda pairs: [(0.5, 0.0)] * len(pairs))
    assert [r.id for r in reranker.rerank("q", ["p3", "p1", "p2"])] == ["p3", "p1", "p2"]


def test_bad_requests_are_named(reranker):
    with pytest.raises(MissingIdsError, match="'nope'"):
        reranker.rerank("q", ["p1", "nope"])
    with pytest.raises(InputError, match="top_k 0"):
        reranker.rerank("q", ["p1"], top_k=0)


def test_another_model_is_refused_with_both_fingerprints(small_table, model_dir, tmp_path):
    other = shutil.copytree(model_dir, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["decoder"]["rms_norm_eps"] = 1e-3
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match=r"fingerprint .* load the model the table") as caught:
        Reranker.open(str(small_table), model=str(other))
    assert caught.value.field == "fingerprint"


def test_a_moved_but_equal_model_is_accepted(small_table, model_dir, tmp_path):
    moved = shutil.copytree(model_dir, tmp_path / "moved")
    assert Reranker.open(str(small_table), model=str(moved)).rerank("q", ["p1"])


@pytest.mark.parametrize(
    ("field", "value"),
    [("template", "{passage}"), ("dim", 64), ("fingerprint", "x")],
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


def test_chunks_read_ahead_and_hot_passages_change_nothing(small_table, reranker, monkeypatch):
    expected = {r.id: r.score for r in reranker.rerank("token state", IDS, ratio=4)}
    monkeypatch.setattr("kalm_encoder.rerank.reranker.CHUNK_CANDIDATES", 7)
    hot = Reranker.open(str(small_table), hot_bytes=1 << 28)
    reads = []
    find = hot.table.find
    monkeypatch.setattr(hot.table, "find", lambda ids, **k: (reads.append(ids), find(ids, **k))[1])
    for ids in (IDS[:30], IDS, IDS[::-1]):  # cold, half warm, warm
        for result in hot.rerank("token state", ids, ratio=4):
            assert abs(result.score - expected[result.id]) <= 1e-5
    assert sum(map(len, reads)) == 60, "each passage is read once"
    assert hot.rerank("token state", IDS[:1], ratio=2)[0].score != expected[IDS[0]]


def test_given_states_are_used_instead_of_the_tables(reranker):
    fine = reranker.table.take(["p1", "p2"], ratio=2)
    given = {"new": fine[0], "p2": fine[0]}
    scores = {
        r.id: r.score for r in reranker.rerank("q", ["p1", "p2", "new"], ratio=8, passages=given)
    }
    assert abs(scores["new"] - scores["p1"]) <= 1e-5
    assert scores["p2"] == pytest.approx(scores["p1"], abs=1e-5)


def test_a_prompt_made_before_is_a_query(reranker):
    prompt = reranker.decoder.prompt("token state", "Find duplicates.", "Judge it.")
    how = {"instruction": "Find duplicates.", "system_instruction": "Judge it."}
    expected = reranker.rerank("token state", IDS, **how)
    assert reranker.rerank(prompt, IDS) == expected
