"""A table follows its model through an edit that changes nothing, and through no other."""

import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from kalm_encoder import PassageTable, Reranker
from kalm_encoder.errors import CheckpointError, InputError, MismatchError
from kalm_encoder.model.checkpoint import resolve
from kalm_encoder.table.location import Location
from kalm_encoder.table.spec import SPEC_KEY
from pipeline.run.job import EncodeJob
from pipeline.table.claim import COMPLETE, STATE
from pipeline.table.finish import SealedTable
from pipeline.table.publish import publish
from pipeline.upkeep.adopt import adopt
from pipeline.upkeep.sync import sync
from pipeline.upkeep.verify import verify
from pipeline.workers.local import in_process
from tests.conftest import encode_table, make_texts, write_corpus


@pytest.fixture
def model(model_dir, tmp_path):
    return shutil.copytree(model_dir, tmp_path / "model")


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "c.jsonl", make_texts(20))


@pytest.fixture
def table(model, corpus, tmp_path):
    encode_table(model, corpus, tmp_path / "t.lance")
    return Location(str(tmp_path / "t.lance"))


def edit(folder, name, change):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def fewer_positions(config):
    """An edit of what is read that changes no state: all passages are far shorter."""
    config["encoder"]["text_config"]["max_position_embeddings"] = 5000


def narrow_windows(config):
    config["encoder"]["text_config"]["sliding_window"] = 2


def made_earlier(table):
    """Let the table record its model as tables did before there were two hashes."""
    claim = SealedTable(table)
    claim.begin_change(rows=False)
    old = replace(claim.spec, fingerprint=claim.spec.files_hash, files_hash=None, weights_hash=None)
    fields = json.loads(old.to_json())
    del fields["files_hash"], fields["weights_hash"]
    claim.change({SPEC_KEY: json.dumps(fields), STATE: COMPLETE})
    publish(table)


def test_an_edit_that_nobody_reads_needs_no_adoption(table, model):
    before = Reranker.open(table.uri).rerank("where are states", ["p1", "p2"])
    edit(model, "tokenizer_config.json", lambda c: c.update(chat_template="{{ messages }}"))
    edit(model, "config.json", lambda c: c.update(_comment="edited"))
    assert Reranker.open(table.uri).rerank("where are states", ["p1", "p2"]) == before
    assert adopt(table, str(model)) is None


def test_an_edit_that_changes_nothing_is_adopted_with_its_proof(table, model, corpus):
    edit(model, "config.json", fewer_positions)
    with pytest.raises(MismatchError, match="kalm adopt"):
        Reranker.open(table.uri)
    job = EncodeJob(inputs=(str(corpus),), uri=table.uri, model=str(model))
    with pytest.raises(MismatchError, match="kalm adopt"):
        sync(job, in_process)
    version = PassageTable.open(table.uri).version
    report = adopt(table, str(model), sample=5)
    assert report.largest_state_error < 1e-2
    adopted = PassageTable.open(table.uri)
    assert adopted.version > version
    assert adopted.spec.fingerprint == resolve(str(model)).fingerprint
    assert verify(table.uri, sample=3).num_problems == 0
    assert Reranker.open(table.uri).rerank("where are states", ["p1"])


def test_other_weights_are_refused(table, model):
    file = model / "model.safetensors"
    weights = load_file(file)
    name = next(n for n in weights if "decoder" in n)
    weights[name] = weights[name] + 1e-6
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(MismatchError, match=r"the weights of .* are not those that made"):
        adopt(table, str(model))
    assert PassageTable.open(table.uri).spec.fingerprint != resolve(str(model)).fingerprint


def test_an_edit_that_changes_states_is_refused_with_a_row(table, model):
    edit(model, "config.json", narrow_windows)
    with pytest.raises(MismatchError, match=r"rows of .* come out differently .*'p\d+': states"):
        adopt(table, str(model), sample=5)


def test_a_table_without_text_cannot_prove_it(model, corpus, tmp_path):
    encode_table(model, corpus, tmp_path / "n.lance", keep_text=False)
    edit(model, "config.json", fewer_positions)
    with pytest.raises(InputError, match="stores no text"):
        adopt(Location(str(tmp_path / "n.lance")), str(model))


def test_a_table_of_before_is_read_synced_and_adopted(table, model, corpus, tmp_path):
    made_earlier(table)
    assert PassageTable.open(table.uri).spec.files_hash is None
    assert Reranker.open(table.uri).rerank("where are states", ["p1"])
    write_corpus(corpus, make_texts(21))
    job = EncodeJob(inputs=(str(corpus),), uri=table.uri, model=str(model))
    assert sync(job, in_process)[0].new == 1
    edited = shutil.copytree(model, tmp_path / "edited")
    edit(edited, "tokenizer_config.json", lambda c: c.update(chat_template="{{ messages }}"))
    with pytest.raises(MismatchError, match="kalm adopt"):
        Reranker.open(table.uri, model=edited)
    adopt(table, str(edited), sample=5)
    spec = PassageTable.open(table.uri).spec
    assert (spec.fingerprint, spec.weights_hash) == (
        resolve(str(edited)).fingerprint,
        resolve(str(model)).weights_hash,
    )
    assert Reranker.open(table.uri, model=model).rerank("where are states", ["p1"])


def test_weights_that_nobody_recorded_and_nobody_has_are_not_guessed(table, model):
    made_earlier(table)
    edit(model, "config.json", fewer_positions)  # in place: the files that made it are gone
    with pytest.raises(CheckpointError, match="its files are others now"):
        adopt(table, str(model))
