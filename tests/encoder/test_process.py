"""What was opened before a fork, or is sent to another process, works or says why not."""

import copy
import multiprocessing
import pickle

import numpy as np
import pytest

from kalm_encoder import PassageEncoder, PassageTable, QueryDecoder, Reranker
from kalm_encoder.adapters.cross_encoder import KaLMCrossEncoder
from kalm_encoder.adapters.lancedb import KaLMReranker
from kalm_encoder.adapters.langchain import KaLMCompressor
from kalm_encoder.adapters.llama_index import KaLMNodePostprocessor
from kalm_encoder.errors import InputError, MissingIdsError
from kalm_encoder.model import onednn
from tests.support.commands import FORKS, HANG_S
from tests.support.forking import IDS, open_and_fork, rank

PACKED = [False, True] if onednn.AVAILABLE else [False]


def test_what_was_opened_before_a_fork_says_so_and_what_the_worker_opens_works(
    small_table, model_dir, tmp_path
):
    out = tmp_path / "out"
    process = FORKS.Process(target=open_and_fork, args=(small_table, model_dir, out))
    process.start()
    process.join(HANG_S)
    assert process.exitcode == 0
    lines = out.read_text().splitlines()
    assert lines[:2] == ["first works", "exit 0"]
    assert lines[-1] == "exit 0" and len(lines) == 13, lines
    for line in lines[2:-1]:
        assert "was forked from process" in line and "the method spawn" in line, line
        assert "or open tables and models in the workers alone" in line


def test_spawn_is_a_remedy_and_the_copy_reads_the_same_version(small_table):
    reranker = Reranker.open(small_table, hot_bytes=1 << 20, index_bytes=1 << 20)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(rank, (reranker,))
    again = pickle.loads(pickle.dumps(reranker))
    assert rank(again) == rank(reranker) == there
    assert again.table.version == reranker.table.version
    assert again.table.index is not None and again.decoder.hot is not None
    assert len(pickle.dumps(reranker)) < 2000, "an address, no weights"


def test_adapters_are_pickled_with_the_address(small_table):
    for adapter in (
        KaLMCrossEncoder(small_table, ratio=8),
        KaLMReranker(small_table, ratio=8),
        KaLMCompressor(reranker=small_table, ratio=8),
        KaLMNodePostprocessor(reranker=small_table, ratio=8),
    ):
        again = pickle.loads(pickle.dumps(adapter))
        assert again._reranker.rerank("q", IDS) == adapter._reranker.rerank("q", IDS)


def test_what_cannot_be_pickled_says_what_to_do(small_table, decoder, encoder):
    made = Reranker(PassageTable.open(small_table), decoder)
    with pytest.raises(InputError, match=r"only a Reranker made by Reranker\.open"):
        pickle.dumps(made)
    pickle.dumps(Reranker.open(small_table))  # the remedy
    with pytest.raises(InputError, match="PassageEncoder cannot be pickled: make one in the other"):
        copy.deepcopy(encoder)


def test_a_table_is_pickled(small_table):
    table = pickle.loads(pickle.dumps(PassageTable.open(small_table, index_bytes=1 << 20)))
    assert len(table.take(IDS)) == 3


@pytest.mark.parametrize("here", PACKED)
@pytest.mark.parametrize("there", PACKED)
def test_a_decoder_is_pickled_for_any_cpu(model_dir, here, there, monkeypatch):
    monkeypatch.setattr(onednn, "FASTER", here)
    hot = QueryDecoder(model_dir, hot_bytes=1 << 20)
    pickled = pickle.dumps(hot)
    monkeypatch.setattr(onednn, "FASTER", there)
    again = pickle.loads(pickled)
    assert again.prompt("q") == hot.prompt("q") and again.hot.nbytes == 0
    is_packed = any(isinstance(module, onednn.PackedLinear) for module in again.model.modules())
    assert is_packed == (here and there)
    passages = [np.random.default_rng(n).standard_normal((n, hot.dim)) for n in (3, 9)]
    before, after = (each.score("q", passages) for each in (hot, again))
    np.testing.assert_allclose(after, before, atol=1e-6)


def test_errors_survive_the_way_back_from_a_worker():
    error = pickle.loads(pickle.dumps(MissingIdsError(["x"], "t.lance", "look elsewhere")))
    assert (error.ids, error.uri, error.remedy) == (["x"], "t.lance", "look elsewhere")
    assert "look elsewhere" in str(error)


def test_a_path_is_an_address_wherever_one_is_taken(small_table, model_dir):
    assert len(PassageTable.open(small_table)) == 60
    assert rank(Reranker.open(small_table, model=model_dir))
    assert PassageEncoder(model_dir).max_length == 1024
    assert QueryDecoder(model_dir).dim == 128
