"""The benchmarks compare like with like: peers compute the same states, counts add up."""

import json
import re
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import numpy as np
import pytest
import torch
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextEncoder

from jobs.demo_training.architecture import configuration
from kalm_encoder.model.checkpoint import DEMO_NAME, resolve
from kalm_encoder.model.tokens import passage_ids
from pipeline.estimate import flops
from tests import bench
from tests.bench import data, peers
from tests.bench.data import write_corpus
from tests.bench.encode import read_records, run_ours, run_peer, run_process
from tests.bench.forwards import ms_marco_lengths, plain_states, random_encoder
from tests.bench.gpu_check import check, kernels
from tests.conftest import make_texts
from tests.support.random_model import TINY


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus.jsonl", make_texts(70))


@pytest.mark.parametrize("module", [m.name for m in walk_packages(bench.__path__, "tests.bench.")])
def test_every_benchmark_can_be_imported(module):
    if "stub" not in module:
        import_module(module)


def test_passages_have_exactly_the_wanted_tokens(monkeypatch):
    page = (Path(__file__).parents[2] / "docs/benchmarks.md").read_text()
    monkeypatch.setattr(data, "standard_library_docs", lambda: [{"text": page}])
    data._documentation.cache_clear()
    tokenizer, lengths = resolve(DEMO_NAME).tokenizer(), [12, 40, 128, 1024]
    texts = data.passages_of(tokenizer, lengths)
    data._documentation.cache_clear()
    assert passage_ids(tokenizer, texts)[1].tolist() == lengths


def test_lengths_are_those_of_ms_marco():
    assert 75 < np.mean(ms_marco_lengths(640)) < 87


def test_peers_compute_the_states_that_we_compute(encoder, model_dir):
    texts = make_texts(9)
    states, tokens, computed = peers.PlainEncoder(str(model_dir)).encode(texts)
    ours = encoder.encode(texts)
    assert tokens == sum(p.num_tokens for p in ours)
    assert computed == len(texts) * max(p.num_tokens for p in ours)
    padded = plain_states(encoder.model, [t.ids for t in encoder.tokenise(texts)])
    for row, again, passage in zip(states, padded, ours, strict=True):
        np.testing.assert_allclose(row[: len(passage.states)], passage.states, atol=1e-4)
        np.testing.assert_allclose(again[: len(passage.states)], passage.states, atol=1e-4)


def padded_size(lengths, order):
    """Tokens that batches of 32 hold, padding included."""
    batches = [order[i : i + peers.ROWS] for i in range(0, len(order), peers.ROWS)]
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


def test_counts_of_peers_are_those_of_their_batches(encoder, model_dir):
    texts = make_texts(70)
    lengths = [len(t.ids) for t in encoder.tokenise(texts)]
    order = peers.by_pair(texts)
    assert sorted(order) == list(range(70))
    counts = peers.run_reference(str(model_dir), texts)
    assert counts["tokens"] == sum(lengths)
    assert counts["computed"] == padded_size(lengths, order)
    assert peers.run_ceiling(str(model_dir), texts)["tokens"] == sum(lengths)


@pytest.mark.slow
def test_ray_data_encodes_the_corpus_in_its_order(model_dir, corpus, encoder):
    texts = make_texts(70)
    lengths = [len(t.ids) for t in encoder.tokenise(texts)]
    computed = padded_size(lengths, range(70))
    run = run_peer("ray_data", str(model_dir), corpus)
    assert run.padding == pytest.approx(1 - sum(lengths) / computed)
    assert run.tokens_per_s > 0


@pytest.mark.slow
def test_ours_is_timed_from_the_first_read_to_the_last_shard(model_dir, corpus, tmp_path):
    table = tmp_path / "ours.lance"
    run = run_ours(str(model_dir), corpus, table, "--shard-size", 20, "--workers", 0)
    shards, _ = read_records(table)
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
    config = configuration(flops.MODELS[name], resolve(DEMO_NAME).tokenizer()).encoder.text_config
    assert flops.Dimensions.of(config) == flops.MODELS[name]


def test_an_encoder_made_on_the_device_is_a_whole_one():
    tokenizer = resolve(DEMO_NAME).tokenizer()
    made = random_encoder(TINY, tokenizer, torch.device("cpu"), torch.float32)
    whole = T5Gemma2TextEncoder(made.config, made.embed_tokens.eoi_token_index).eval()
    whole.load_state_dict(made.state_dict())
    ids = [[5, 6, 7], [9]]
    np.testing.assert_allclose(plain_states(made, ids), plain_states(whole, ids))


def test_kernels_that_overlap_count_once():
    assert kernels.covered([(5, 6), (0, 2), (1, 3), (1.5, 2)]) == 4


def test_the_gpu_check_runs_anywhere_at_toy_size(capsys):
    assert check.main(["--toy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("failed: nothing")
    equality = [
        re.search(r"float32 ours (\S+) .* over theirs (\S+),", x) for x in lines if "equal" in x
    ]
    assert len(equality) == 4
    assert all(float(found[1]) < 1e-5 and float(found[2]) <= 1.2 for found in equality)
    speeds = [re.search(r"([\d,]+) tokens/s, of rate (\S+)%", x) for x in lines]
    speeds = [found for found in speeds if found]
    assert len(speeds) == 2
    assert all(int(found[1].replace(",", "")) > 0 and float(found[2]) > 0 for found in speeds)


@pytest.mark.slow
def test_the_ceiling_of_the_host_is_that_of_the_real_pipeline():
    module = "tests.bench.gpu_check.host_ceiling"
    printed, _ = run_process(module, "1e9", 2, "--passages", 200)
    tokens = int(re.search(r"in flight: (\d+) tokens", printed)[1])
    assert tokens > 200 * 40
    rates = re.findall(r"median (\S+) .* thousand tokens per core-second", printed)
    host, alone = map(float, rates)
    assert float(re.search(r"over tokenise: median (\S+)", printed)[1]) > 1
    assert host < alone
