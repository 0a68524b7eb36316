"""The benchmarks compare like with like: peers compute the same states, counts add up."""

import json

import numpy as np
import pytest
import torch
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextEncoder

from jobs.demo_training.architecture import LARGE, NANO, SMALL, TINY, configuration
from kalm_encoder.model.checkpoint import DEMO_NAME, resolve
from kalm_encoder.model.encoder import passage_ids
from pipeline.estimate import flops
from tests.bench import gpu, peers
from tests.bench.data import DISTRIBUTIONS, passages_of, write_corpus
from tests.bench.encode_runs import read_run, run_ours, run_peer
from tests.conftest import make_texts


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus.jsonl", make_texts(70))


def test_passages_have_exactly_the_wanted_tokens():
    tokenizer, lengths = resolve(DEMO_NAME).tokenizer(), [12, 40, 128, 1024]
    texts = passages_of(tokenizer, lengths)
    assert [len(ids) for ids in passage_ids(tokenizer, texts)] == lengths


def test_distributions_are_what_their_names_say():
    lengths = {name: make(640) for name, make in DISTRIBUTIONS.items()}
    assert 75 < np.mean(lengths["ms-marco"]) < 87
    assert set(lengths["equal"]) == {128}
    assert 0.15 < np.mean(np.array(lengths["web"]) == 1024) < 0.35
    rows = np.array(lengths["adversarial"]).reshape(-1, peers.ROWS)
    assert ((rows == 1024).sum(axis=1) == 1).all()
    assert np.median(rows) == 40


def test_peers_compute_the_states_that_we_compute(encoder, model_dir):
    texts = make_texts(9)
    states, tokens, computed = peers.PlainEncoder(str(model_dir)).encode(texts)
    ours = encoder.encode(texts)
    assert tokens == sum(p.num_tokens for p in ours)
    assert computed == len(texts) * max(p.num_tokens for p in ours)
    padded = peers.plain_states(encoder.model, [t.ids for t in encoder.tokenise(texts)])
    for row, again, passage in zip(states, padded, ours, strict=True):
        np.testing.assert_allclose(row[: len(passage.states)], passage.states, atol=1e-4)
        np.testing.assert_allclose(again[: len(passage.states)], passage.states, atol=1e-4)


def test_counts_of_peers_are_those_of_their_batches(encoder, model_dir):
    texts = make_texts(70)
    lengths = [len(t.ids) for t in encoder.tokenise(texts)]
    for order in peers.ORDERS.values():
        assert sorted(order(texts)) == list(range(70))
        counts = peers.run_plain(str(model_dir), texts, order)
        batches = peers.fixed_rows(order(texts))
        assert counts["tokens"] == sum(lengths)
        assert counts["computed"] == peers.padded_size(lengths, batches)
    assert peers.run_ceiling(str(model_dir), texts)["tokens"] == sum(lengths)


@pytest.mark.slow
def test_ray_data_encodes_the_corpus_in_its_order(model_dir, corpus, encoder):
    texts = make_texts(70)
    lengths = [len(t.ids) for t in encoder.tokenise(texts)]
    computed = peers.padded_size(lengths, peers.fixed_rows(range(70)))
    run = run_peer("ray_data", str(model_dir), corpus)
    assert run.padding == pytest.approx(1 - sum(lengths) / computed)
    assert run.tokens_per_s > 0


@pytest.mark.slow
def test_ours_is_timed_from_the_first_read_to_the_last_shard(model_dir, corpus, tmp_path):
    table = tmp_path / "ours.lance"
    run = run_ours(str(model_dir), corpus, table, "--shard-size", 20, "--workers", 0)
    shards, _ = read_run(table)
    assert sum(shard["rows"] for shard in shards) == 70
    tokens = sum(shard["tokens"] for shard in shards)
    assert run.tokens_per_s == pytest.approx(tokens / run.encode_s)
    assert run.start_s + run.encode_s + run.finish_s < run.wall_s
    assert {"read", "forward", "write"} <= set(run.stages)


def test_long_passages_are_timed_in_turn(model_dir, capsys, monkeypatch):
    monkeypatch.setattr(peers, "LONG_BATCHES", {"long_passages": [64] * 2})
    peers.main("long_passages", str(model_dir), "2")
    times = json.loads(capsys.readouterr().out)["long_passages"]
    assert len(times) == 2
    assert all(t["wall"] > 0 and t["cpu"] > 0 for t in times)


@pytest.mark.parametrize("name", ["Nano", "Small", "Large"])
def test_dimensions_are_those_that_plans_count_with(name):
    dimensions = {"Nano": NANO, "Small": SMALL, "Large": LARGE}[name]
    config = configuration(dimensions, resolve(DEMO_NAME).tokenizer()).encoder.text_config
    assert flops.Shape.of(config) == flops.MODELS[name]


def test_an_encoder_made_on_the_device_is_a_whole_one():
    tokenizer = resolve(DEMO_NAME).tokenizer()
    made = gpu.random_encoder(TINY, tokenizer, torch.device("cpu"), torch.float32)
    whole = T5Gemma2TextEncoder(made.config, made.embed_tokens.eoi_token_index).eval()
    whole.load_state_dict(made.state_dict())
    ids = [[5, 6, 7], [9]]
    np.testing.assert_allclose(peers.plain_states(made, ids), peers.plain_states(whole, ids))


def test_kernels_that_overlap_count_once():
    assert gpu.covered([(5, 6), (0, 2), (1, 3), (1.5, 2)]) == 4


def test_the_gpu_script_runs_anywhere_at_toy_size(capsys):
    assert gpu.main(["--toy"]) == []
    lines = capsys.readouterr().out.splitlines()
    assert "operations/s" in lines[0]
    rows = [line.split() for line in lines[2:]]
    assert [row[:2] for row in rows] == [["Toy", "eager"]] * 2
    for row in rows:
        tokens_per_s, of_rate = row[-6], row[-5]
        assert float(tokens_per_s.replace(",", "")) > 0
        assert float(of_rate.rstrip("%")) > 0
