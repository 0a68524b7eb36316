"""Coarse first, fine for the best: what a cascade and a time budget return."""

from types import SimpleNamespace

import pytest

from kalm_encoder import Reranker
from kalm_encoder.errors import InputError

IDS = [f"p{i}" for i in range(60)]


@pytest.fixture(scope="module")
def reranker(small_table):
    return Reranker.open(str(small_table))


def scores(reranker, ratio, ids=IDS):
    return {r.id: r.score for r in reranker.rerank("token state", ids, ratio=ratio)}


def test_the_best_of_the_coarse_stage_are_scored_again(reranker):
    coarse, fine = reranker.rerank("token state", IDS, ratio=8), scores(reranker, 2)
    results = reranker.rerank("token state", IDS, cascade=[(8, 20), (2, None)])
    assert {r.id for r in results} == set(IDS)
    assert [r.ratio for r in results] == [2] * 20 + [8] * 40
    assert {r.id for r in results[:20]} == {r.id for r in coarse[:20]}
    assert [r.id for r in results[20:]] == [r.id for r in coarse[20:]]
    for result in results[:20]:
        assert abs(result.score - fine[result.id]) <= 1e-5
    assert [r.score for r in results[:20]] == sorted((r.score for r in results[:20]), reverse=True)


def test_a_stage_that_keeps_all_equals_no_cascade(reranker):
    one = scores(reranker, 2)
    two = reranker.rerank("token state", IDS, cascade=[(16, None), (8, None), (2, None)])
    assert {r.id for r in two} == set(IDS)
    assert all(abs(r.score - one[r.id]) <= 1e-5 for r in two)
    assert reranker.rerank("token state", IDS, cascade=[(8, 5), (2, None)], top_k=3)[-1].ratio == 2


def test_a_coarse_stage_reads_only_its_own_column(reranker, monkeypatch):
    read = []
    real = type(reranker.table)._scan

    def watched(self, columns, wanted):
        read.append([c for c in columns if c.startswith("states")])
        return real(self, columns, wanted)

    monkeypatch.setattr(type(reranker.table), "_scan", watched)
    reranker.rerank("q", IDS, cascade=[(8, 4), (2, None)])
    assert read == [["states_r8"], ["states_r2"]]


def test_time_runs_out_and_the_result_says_so(reranker, monkeypatch):
    real = reranker.decoder.score_pairs

    clock_s = [0.0]

    def slow(pairs):
        clock_s[0] += 0.05
        return real(pairs)

    plenty = reranker.rerank("token state", IDS, max_ms=60_000)
    assert {r.ratio for r in plenty} == {2}
    monkeypatch.setattr(reranker.decoder, "score_pairs", slow)
    clock = SimpleNamespace(monotonic=lambda: clock_s[0])
    monkeypatch.setattr("kalm_encoder.rerank.reranker.time", clock)
    results = reranker.rerank("token state", IDS, max_ms=220)
    assert {r.id for r in results} == set(IDS)
    ratios = [r.ratio for r in results]
    assert ratios == sorted(ratios)
    assert 16 in ratios, "some were not reached"
    assert clock_s[0] <= 0.22
    first = reranker.rerank("token state", IDS, max_ms=1)
    assert {r.ratio for r in first} == {16}


def test_impossible_requests_are_named(reranker):
    for wrong, message in (
        ({"cascade": [(2, 5), (8, None)]}, "from coarse to fine"),
        ({"cascade": []}, "from coarse to fine"),
        ({"cascade": [(8, 0), (2, None)]}, "cannot keep 0"),
        ({"cascade": [(7, 5), (2, None)]}, "ratio 7 is not a multiple"),
        ({"cascade": [(8, 5)], "ratio": 2}, "not both"),
        ({"max_ms": 0}, "max_ms 0 must be above 0"),
    ):
        with pytest.raises(InputError, match=message):
            reranker.rerank("q", ["p1"], **wrong)
