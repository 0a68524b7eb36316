import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from kalm_encoder import PassageEncoder, QueryDecoder
from kalm_encoder.errors import CheckpointError, InputError
from kalm_encoder.model import checkpoint
from kalm_encoder.model.checkpoint import DEMO_CHECKPOINT, resolve
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
    states = PassageEncoder(str(copy)).encode(["one passage"])[0].states
    assert (states == encoder.encode(["one passage"])[0].states).all()
    scores = QueryDecoder(str(copy)).score("query", [states])
    assert scores == decoder.score("query", [states])


def test_sharded_weights_load_the_same(model_dir, tmp_path, encoder):
    full = AutoModelForSeq2SeqLM.from_pretrained(model_dir, dtype=torch.float32)
    full.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for file in model_dir.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    states = PassageEncoder(str(tmp_path)).encode(["one passage"])[0].states
    assert (states == encoder.encode(["one passage"])[0].states).all()


def test_a_missing_weight_is_an_error_that_names_it(copy):
    rewrite(copy, lambda w: {k: v for k, v in w.items() if "encoder.norm" not in k})
    with pytest.raises(CheckpointError, match=r"no weight encoder\.norm\.weight"):
        PassageEncoder(str(copy))
    QueryDecoder(str(copy))  # the other half is whole


def test_weights_that_do_not_fit_the_config_are_refused(copy):
    rewrite(copy, lambda w: {k: v[:1] if "encoder.norm" in k else v for k, v in w.items()})
    with pytest.raises(CheckpointError, match=r"do not fit its config\.json"):
        PassageEncoder(str(copy))


def test_truncated_weights_are_refused(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="damaged"):
        PassageEncoder(str(copy))


def test_pickled_weights_are_never_loaded(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        PassageEncoder(str(copy))


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
        QueryDecoder(str(copy))


def test_a_larger_tokenizer_than_the_model_is_refused(copy):
    texts = [f"{i:x}{i * 7919:x}" for i in range(40_000)]
    train_tokenizer(texts, 9000).save_pretrained(copy)
    with pytest.raises(CheckpointError, match="do not belong together"):
        PassageEncoder(str(copy)).encode(texts[:2000])


def edited(file, change):
    """Apply a change to the content of a JSON file."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content, indent=3))


COSMETIC = {
    "a chat template": ("tokenizer_config.json", lambda c: c.update(chat_template="{{ x }}")),
    "a comment": ("config.json", lambda c: c.update(_comment="edited")),
    "the dtype on disk": ("config.json", lambda c: c.update(dtype="bfloat16")),
    "a label": ("config.json", lambda c: c["decoder"].update(id2label={"0": "no"})),
    "dropout": ("config.json", lambda c: c.update(dropout_rate=0.5)),
    "lengths": ("tokenizer.json", lambda c: c.update(truncation=None, padding=None)),
    "a length": ("tokenizer_config.json", lambda c: c.update(model_max_length=5)),
}
READ = {
    "a window": ("config.json", lambda c: c["encoder"]["text_config"].update(sliding_window=7)),
    "a norm": ("config.json", lambda c: c["decoder"].update(rms_norm_eps=1e-3)),
    "positions": (
        "config.json",
        lambda c: c["decoder"]["rope_parameters"]["full_attention"].update(rope_theta=1e4),
    ),
    "a merge": ("tokenizer.json", lambda c: c["model"]["merges"].pop()),
    "an added token": ("tokenizer.json", lambda c: c["added_tokens"].pop()),
    "a normalizer": ("tokenizer.json", lambda c: c.update(normalizer={"type": "Lowercase"})),
    "a special token": ("tokenizer_config.json", lambda c: c.update(unk_token="?")),
}


@pytest.mark.parametrize("name", COSMETIC)
def test_an_edit_that_nobody_reads_keeps_the_fingerprint(copy, name):
    before = resolve(str(copy))
    fingerprint, files_hash = before.fingerprint, before.files_hash
    edited(copy / COSMETIC[name][0], COSMETIC[name][1])
    after = resolve(str(copy))
    assert (after.fingerprint, after.files_hash != files_hash) == (fingerprint, True)
    assert after.made(fingerprint, files_hash)
    assert not after.made(files_hash, None), "an older table goes by all bytes"
    assert before.made(files_hash, None)


@pytest.mark.parametrize("name", READ)
def test_an_edit_of_what_is_read_changes_the_fingerprint(copy, name):
    before = resolve(str(copy)).fingerprint
    edited(copy / READ[name][0], READ[name][1])
    assert resolve(str(copy)).fingerprint != before


def test_the_fingerprint_goes_by_the_weights_and_not_by_their_files(copy):
    """Weights in two files, with other metadata and without what texts never use."""
    before = resolve(str(copy))
    fingerprint, weights_hash = before.fingerprint, before.weights_hash
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(n for n in weights if "vision_tower" not in n)
    for number, some in enumerate((names[:5], names[5:])):
        part = {name: weights[name] for name in some}
        save_file(part, copy / f"model-{number}.safetensors", {"format": "pt", "by": "another"})
    assert resolve(str(copy)).fingerprint == fingerprint
    changed = weights[names[-1]].clone()
    changed.reshape(-1)[0] += 1
    save_file(
        {**{n: weights[n] for n in names[5:]}, names[-1]: changed}, copy / "model-1.safetensors"
    )
    again = resolve(str(copy))
    assert again.weights_hash != weights_hash
    assert again.fingerprint != fingerprint


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
    states = PassageEncoder(hub_id, revision="v1").encode(["one passage"])[0].states
    assert (states == encoder.encode(["one passage"])[0].states).all()


def test_unknown_models_devices_and_dtypes_are_named(model_dir, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="'no-such/model'"):
        resolve("no-such/model")
    with pytest.raises(CheckpointError, match="is a directory and has no revision"):
        resolve(str(model_dir), "main")
    with pytest.raises(InputError, match="dtype 'int8'"):
        PassageEncoder(str(model_dir), dtype="int8")
    with pytest.raises(InputError, match="max_length 3"):
        PassageEncoder(str(model_dir), max_length=3)


def stored_weights(folder, half):
    """What the safetensors files hold for one half, by its own names, read without our code."""
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    own = re.compile(rf"(model\.)?{half}\.(text_model\.)?")
    tied = re.compile(r"(model\.)?(encoder|decoder)\.(text_model\.)?embed_tokens\.")
    return {own.sub("", tied.sub("embed_tokens.", k), count=1): v for k, v in weights.items()}


def text_only(weights):
    return {k: v for k, v in weights.items() if "vision" not in k and "multi_modal" not in k}


LAYOUTS = {
    "whole model": dict,
    "text only": text_only,
    "text only, without model.": lambda w: {
        k.removeprefix("model."): v for k, v in text_only(w).items()
    },
    "encoder.text_model.": lambda w: {
        k.replace("encoder.", "encoder.text_model.", 1): v for k, v in text_only(w).items()
    },
    "embedding under the decoder": lambda w: {
        k.replace("encoder.embed_tokens", "decoder.embed_tokens"): v for k, v in w.items()
    },
    "embedding under both": lambda w: (
        w
        | {
            k.replace("encoder.", "decoder."): v.clone()
            for k, v in w.items()
            if "embed_tokens" in k
        }
    ),
}


@pytest.mark.parametrize("source", ["random", "demo"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_the_stored_one_to_the_bit(model_dir, tmp_path, source, layout, dtype):
    copy = shutil.copytree(model_dir if source == "random" else DEMO_CHECKPOINT, tmp_path / "copy")
    rewrite(copy, LAYOUTS[layout])
    files = resolve(str(copy))
    for half, load in (("encoder", files.load_text_encoder), ("decoder", files.load_decoder)):
        loaded = load(torch.device("cpu"), dtype).state_dict()
        stored = stored_weights(copy, half)
        assert len(loaded) == 29 or source == "random"
        for name, tensor in loaded.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, stored[name].to(dtype)), name


def test_all_missing_weights_are_named(copy):
    gone = ("model.decoder.norm.weight", "model.decoder.layers.1.mlp.up_proj.weight")
    rewrite(copy, lambda w: {k: v for k, v in w.items() if k not in gone})
    with pytest.raises(CheckpointError) as caught:
        QueryDecoder(str(copy))
    assert all(key.removeprefix("model.") in str(caught.value) for key in gone)


def test_only_the_weights_of_the_half_are_read(model_dir, monkeypatch):
    read = []
    real = checkpoint.safe_open

    class Recording:
        def __init__(self, file, framework):
            self.opened = real(file, framework=framework)

        def __enter__(self):
            self.weights = self.opened.__enter__()
            return self

        def __exit__(self, *error):
            return self.opened.__exit__(*error)

        def keys(self):
            return self.weights.keys()

        def get_tensor(self, key):
            read.append(key)
            return self.weights.get_tensor(key)

    monkeypatch.setattr(checkpoint, "safe_open", Recording)
    decoder = resolve(str(model_dir)).load_decoder(torch.device("cpu"), torch.float32)
    assert len(read) == len(decoder.state_dict())
    assert all("decoder." in key or "embed_tokens." in key for key in read)


def test_overwriting_the_file_does_not_change_a_loaded_model(copy):
    files, device = resolve(str(copy)), torch.device("cpu")
    halves = [files.load_text_encoder(device, torch.float32)]
    halves.append(files.load_decoder(device, torch.float32))
    before = [{k: v.clone() for k, v in half.state_dict().items()} for half in halves]
    file = copy / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(b"\xff" * (file.stat().st_size // 2))
    for half, was in zip(halves, before, strict=True):
        assert all(torch.equal(tensor, was[k]) for k, tensor in half.state_dict().items())
