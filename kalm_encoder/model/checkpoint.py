"""Finds a checkpoint and loads one half of it; weights.py reads its files, nothing else does.

A KaLM reranker on the hub is a whole T5Gemma2: text encoder, decoder and a vision tower of 417M
parameters that text reranking never uses. A passage worker needs the text encoder, a query process
the decoder; each is built without weights and filled from the safetensors files, and a weight that
is missing is an error (`from_pretrained` on a half leaves random weights there without one).
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoTokenizer, T5Gemma2Config
from transformers.models.t5gemma2.modeling_t5gemma2 import (
    T5Gemma2Decoder,
    T5Gemma2RotaryEmbedding,
    T5Gemma2TextEncoder,
)

from kalm_encoder.errors import CheckpointError, InputError
from kalm_encoder.model.weights import read_tensors, weight_index
from kalm_encoder.version import __version__

TOKENIZER_FILES = (
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)
DEMO_CHECKPOINT = Path(__file__).parent.parent / "demo_checkpoint"
"""A small trained checkpoint that comes with the package; see the README.md in it."""
DEMO_NAME = "kalm-demo"
"""What it is called where a model is asked for."""
DEMO_NOTE = (
    "This is the demo checkpoint: 3.5 million parameters trained for an hour on documentation. It "
    "shows how ratios and dtypes behave, and says nothing of KaLM-Reranker-V1's quality."
)
WEIGHTS_INDEX = "model.safetensors.index.json"
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class Checkpoint:
    """Files of one model revision on this machine.

    Attributes:
        path: directory that holds config, tokenizer and weights.
        name: what the user called it: a hub id or the directory.
        revision: the hub commit the files come from, for `kalm-demo` the version of this package;
            None for a local directory.
    """

    path: Path
    name: str
    revision: str | None

    @cached_property
    def config(self) -> T5Gemma2Config:
        """The model's configuration."""
        try:
            config = T5Gemma2Config.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read config.json of {self.name}: {error}") from error
        if config.model_type != "t5gemma2":
            raise CheckpointError(
                f"{self.name} is a {config.model_type!r} model; KaLM rerankers are 't5gemma2'"
            )
        return config

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 over the names and contents of config, tokenizer and weights files.

        Two checkpoints with one fingerprint produce the same states and scores. Reads every byte
        (about a second a gigabyte and core).
        """
        names = ["config.json", *TOKENIZER_FILES, WEIGHTS_INDEX]
        files = [self.path / n for n in names if (self.path / n).exists()] + self._weight_files()
        with ThreadPoolExecutor() as pool:
            digests = pool.map(_sha256, files)
        lines = sorted(f"{f.name} {d}" for f, d in zip(files, digests, strict=True))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def tokenizer(self) -> Any:
        """Load the tokenizer of exactly these files.

        Raises:
            CheckpointError: it cannot be loaded or has neither a pad nor an end token.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:  # tokenizers raises plain Exception for a damaged file
            raise CheckpointError(f"cannot load the tokenizer of {self.name}: {error}") from error
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise CheckpointError(f"the tokenizer of {self.name} has no pad and no end token")
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype) -> T5Gemma2TextEncoder:
        """Build the text encoder alone: embedding, encoder layers, final norm."""
        with torch.device("meta"):
            model = T5Gemma2TextEncoder(self.config.encoder.text_config, self._eoi())
        return self._fill(model, "encoder.", device, dtype)

    def load_decoder(self, device: torch.device, dtype: torch.dtype) -> T5Gemma2Decoder:
        """Build the decoder alone; its embedding doubles as the LM head, as the model ties them."""
        with torch.device("meta"):
            model = T5Gemma2Decoder(self.config.decoder, self._eoi())
        return self._fill(model, "decoder.", device, dtype)

    def _eoi(self) -> int:
        return int(self.config.eoi_token_index)

    def _fill(self, model: Any, prefix: str, device: torch.device, dtype: torch.dtype) -> Any:
        """Give a model built on the meta device its weights from the files."""
        index = weight_index(self._weight_files(), self.name)
        state = {}
        for name in model.state_dict():
            # The embedding is stored once, under whichever module the writer met first.
            tied = ("encoder.", "decoder.") if name.startswith("embed_tokens.") else ()
            found = next((index[p + name] for p in (prefix, *tied) if p + name in index), None)
            if found is None:
                raise CheckpointError(
                    f"{self.name} has no weight {prefix}{name}: it is not a complete KaLM "
                    "reranker. Download it again, or check the model id."
                )
            state[name] = found
        try:
            tensors = read_tensors(state, device, dtype)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"a weights file of {self.name} is damaged ({error}). Download it again."
            ) from error
        try:
            model.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"the weights of {self.name} do not fit its config.json: {error}"
            ) from error
        # Buffers that are derived, not stored, are still on the meta device.
        model.rotary_emb = T5Gemma2RotaryEmbedding(model.config)
        model.embed_tokens.embed_scale = torch.tensor(model.embed_tokens.scalar_embed_scale)
        return model.to(device).requires_grad_(False).eval()

    def _weight_files(self) -> list[Path]:
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"no .safetensors file in {self.name}: other weight formats are never loaded"
            )
        return files


def resolve(
    model_name_or_path: str, revision: str | None = None, *, weights: bool = True
) -> Checkpoint:
    """Find a checkpoint: a local directory, `kalm-demo`, or a hub id that is downloaded once.

    Weights, config and tokenizer all come from one snapshot, so a revision pins the three of them.

    Args:
        model_name_or_path: hub id or directory.
        revision: of the hub id.
        weights: whether to download the weights too; counting tokens needs none.

    Raises:
        CheckpointError: neither a directory nor a hub id that can be fetched, or a directory given
            with a revision.
    """
    path = Path(model_name_or_path)
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{model_name_or_path} is a directory and has no revision {revision!r}: "
                "leave --revision out"
            )
        if not (path / "config.json").exists():
            raise CheckpointError(f"{model_name_or_path} holds no config.json: not a checkpoint")
        return Checkpoint(path.resolve(), model_name_or_path, None)
    if model_name_or_path == DEMO_NAME:
        return Checkpoint(DEMO_CHECKPOINT, DEMO_NAME, __version__)
    patterns = ["config.json", *TOKENIZER_FILES]
    patterns += [WEIGHTS_INDEX, "*.safetensors"] if weights else []
    try:
        snapshot = snapshot_download(model_name_or_path, revision=revision, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{model_name_or_path!r} (revision {revision or 'main'}) is no local directory and "
            f"cannot be fetched from the Hugging Face hub: {reason}"
        ) from error
    return Checkpoint(Path(snapshot), model_name_or_path, Path(snapshot).name)


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return the device asked for; without one, the first GPU, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device} was asked for, but no CUDA device is available")
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the compute dtype asked for; without one, bfloat16 on GPU and float32 on CPU."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return chosen


def answer_token_id(tokenizer: Any, answer: str) -> int:
    """Return the id of `yes` or `no`, which must be exactly one token.

    Raises:
        CheckpointError: it is several, so the score would read the wrong logit.
    """
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise CheckpointError(
            f"this tokenizer splits {answer!r} into {len(ids)} tokens {ids}; a KaLM reranker "
            "needs one. Is the tokenizer the model's own?"
        )
    return int(ids[0])


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
