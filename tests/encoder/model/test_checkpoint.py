import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from kalm_encoder import PassageEncoder, QueryDecoder
from kalm_encoder.errors import CheckpointError, InputError
from kalm_encoder.model.checkpoint import resolve
from tests.support.random_model import train_tokenizer


@pytest.fixture
def copy(model_dir, tmp_path):
    return shutil.copytree(model_dir, tmp_path / "copy")


def rewrite(folder, change):
    """Apply `change` to the weights on disk."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_halves_equal_the_full_model_to_the_bit(model_dir):
    full = AutoModelForSeq2SeqLM.from_pretrained(model_dir, dtype=torch.float32).model
    device = torch.device("cpu")
    for half, whole in (
        (resolve(str(model_dir)).load_text_encoder(device, torch.float32), full.encoder.text_model),
        (resolve(str(model_dir)).load_decoder(device, torch.float32), full.decoder),
    ):
        wanted = whole.state_dict()
        assert half.state_dict().keys() == wanted.keys()
        for name, tensor in half.state_dict().items():
            assert torch.equal(tensor, wanted[name]), name
        buffers = dict(whole.named_buffers())
        for name, tensor in half.named_buffers():
            assert torch.equal(tensor, buffers[name]), name


@pytest.mark.parametrize(
    "spelling",
    [
        lambda k: k.replace("encoder.embed", "encoder.text_model.embed"),
        lambda k: k.removeprefix("model."),
        lambda k: k.replace("encoder.embed_tokens", "decoder.embed_tokens"),
    ],
)
def test_other_spellings_of_weight_names_load_the_same(copy, decoder, encoder, spelling):
    rewrite(copy, lambda weights: {spelling(k): v for k, v in weights.items()})
    states = PassageEncoder.load(str(copy)).encode(["one passage"])[0].states
    assert (states == encoder.encode(["one passage"])[0].states).all()
    scores = QueryDecoder.load(str(copy)).score("query", [states])
    assert scores == decoder.score("query", [states])


def test_sharded_weights_load_the_same(model_dir, tmp_path, encoder):
    full = AutoModelForSeq2SeqLM.from_pretrained(model_dir, dtype=torch.float32)
    full.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for file in model_dir.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    states = PassageEncoder.load(str(tmp_path)).encode(["one passage"])[0].states
    assert (states == encoder.encode(["one passage"])[0].states).all()


def test_a_missing_weight_is_an_error_that_names_it(copy):
    rewrite(copy, lambda w: {k: v for k, v in w.items() if "encoder.norm" not in k})
    with pytest.raises(CheckpointError, match=r"no weight encoder\.norm\.weight"):
        PassageEncoder.load(str(copy))
    QueryDecoder.load(str(copy))  # the other half is whole


def test_weights_that_do_not_fit_the_config_are_refused(copy):
    rewrite(copy, lambda w: {k: v[:1] if "encoder.norm" in k else v for k, v in w.items()})
    with pytest.raises(CheckpointError, match=r"do not fit its config\.json"):
        PassageEncoder.load(str(copy))


def test_truncated_weights_are_refused(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="damaged"):
        PassageEncoder.load(str(copy))


def test_pickled_weights_are_never_loaded(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        PassageEncoder.load(str(copy))


def test_a_tokenizer_that_splits_yes_is_refused(copy):
    file = copy / "tokenizer.json"
    vocabulary = json.loads(file.read_text())
    del vocabulary["model"]["vocab"]["yes"]
    vocabulary["model"]["merges"] = [
        m for m in vocabulary["model"]["merges"] if "".join(m) != "yes" and "yes" not in m
    ]
    vocabulary["added_tokens"] = [t for t in vocabulary["added_tokens"] if t["content"] != "yes"]
    file.write_text(json.dumps(vocabulary))
    with pytest.raises(CheckpointError, match="splits 'yes' into"):
        QueryDecoder.load(str(copy))


def test_a_larger_tokenizer_than_the_model_is_refused(copy):
    texts = [f"{i:x}{i * 7919:x}" for i in range(40_000)]
    train_tokenizer(texts, 9000).save_pretrained(copy)
    with pytest.raises(CheckpointError, match="do not belong together"):
        PassageEncoder.load(str(copy)).encode(texts[:2000])


@pytest.mark.parametrize("change", ["config.json", "tokenizer.json", "model.safetensors"])
def test_the_fingerprint_covers_every_file(copy, change):
    before = resolve(str(copy)).fingerprint
    with (copy / change).open("ab") as file:
        file.write(b" ")
    assert resolve(str(copy)).fingerprint != before


def test_the_fingerprint_does_not_depend_on_the_folder(copy, model_dir):
    assert resolve(str(copy)).fingerprint == resolve(str(model_dir)).fingerprint


def test_a_hub_id_loads_from_one_pinned_snapshot(model_dir, encoder, tmp_path, monkeypatch):
    """The hub's cache as a download leaves it, and no network."""
    old, new = "a" * 40, "b" * 40
    cached = tmp_path / "models--KaLM-Embedding--Some-Reranker"
    for commit in (old, new):
        shutil.copytree(model_dir, cached / "snapshots" / commit)
    (cached / "snapshots" / new / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(new)
    (cached / "refs" / "v1").write_text(old)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub_id = "KaLM-Embedding/Some-Reranker"
    assert resolve(hub_id).revision == new
    assert resolve(hub_id, "v1").revision == resolve(hub_id, old).revision == old
    assert resolve(hub_id, "v1").fingerprint == resolve(str(model_dir)).fingerprint
    states = PassageEncoder.load(hub_id, revision="v1").encode(["one passage"])[0].states
    assert (states == encoder.encode(["one passage"])[0].states).all()


def test_unknown_models_devices_and_dtypes_are_named(model_dir, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="'no-such/model'"):
        resolve("no-such/model")
    with pytest.raises(CheckpointError, match="is a directory and has no revision"):
        resolve(str(model_dir), "main")
    with pytest.raises(InputError, match="dtype 'int8'"):
        PassageEncoder.load(str(model_dir), dtype="int8")
    with pytest.raises(InputError, match="max_length 3"):
        PassageEncoder.load(str(model_dir), max_length=3)
