"""Finds a checkpoint and loads one half of it.

A KaLM reranker on the hub is a whole T5Gemma2: text encoder, decoder and a vision tower of 417M
parameters that text reranking never uses. A passage worker needs the text encoder and a query
process needs the decoder. Each half is built without weights and filled from the safetensors files.

`from_pretrained` can load a half too, but on a CPU its weights are the mapped file: overwriting the
checkpoint would change a running model after its fingerprint was checked. While it loads, it also
changes torch's default dtype for all threads of a service.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, T5Gemma2Config
from transformers.models.t5gemma2.modeling_t5gemma2 import (
    T5Gemma2Decoder,
    T5Gemma2RotaryEmbedding,
    T5Gemma2TextEncoder,
)

from kalm_encoder.errors import CheckpointError, InputError, first_line
from kalm_encoder.model import contract, onednn
from kalm_encoder.process import check_process
from kalm_encoder.version import __version__

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)
DEMO_CHECKPOINT = Path(__file__).parent.parent / "demo_checkpoint"
"""Directory of a small trained checkpoint that comes with the package; see its README.md."""
DEMO_NAME = "kalm-demo"
"""Name of the demo checkpoint wherever a model is asked for."""
DEMO_NOTE = (
    "This is the demo checkpoint: 3.5 million parameters trained for an hour on documentation. It "
    "shows how ratios and dtypes behave, and says nothing about KaLM-Reranker-V1's quality."
)
WEIGHTS_INDEX = "model.safetensors.index.json"
STORED_NAME = re.compile(r"(?:model\.)?(encoder|decoder)\.(?:text_model\.)?(.+)")
"""Half and name of a weight, in all spellings that transformers has written."""
NOT_TEXT = ("vision_tower.", "multi_modal_projector.")
"""Beginnings of the names of weights that reranking texts never uses."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""What a model may compute in. T5Gemma2 overflows float16."""


Device = str | torch.device | None
Dtype = str | torch.dtype | None


@dataclass(frozen=True)
class Checkpoint:
    """The files of one model revision on this machine.

    Attributes:
        path: Directory that holds config, tokenizer and weights.
        name: Name that the user gave, a hub id or the directory.
        revision: Hub commit; the version of this package for `kalm-demo`, None for a directory.
    """

    path: Path
    name: str
    revision: str | None

    @cached_property
    def config(self) -> T5Gemma2Config:
        """The model's configuration; a CheckpointError if it is not that of a KaLM reranker."""
        try:
            config = T5Gemma2Config.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read config.json of {self.name}: {error}") from error
        if config.model_type != "t5gemma2":
            raise CheckpointError(
                f"{self.name} is a {config.model_type!r} model; KaLM rerankers are 't5gemma2'"
            )
        return config

    @property
    def recorded_name(self) -> str:
        """The name under which a table records it: that of the hub, or the absolute directory."""
        return self.name if self.revision else str(self.path)

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 over all that decides states and scores; see contract.py.

        Equal fingerprints mean equal states and scores. It takes about 1 s per gigabyte and core.

        Raises:
            CheckpointError: If a file is missing or damaged.
        """
        try:
            facts = {
                "config": contract.config_facts(self.config),
                "tokenizer": contract.tokenizer_facts(self.path),
                "weights": self.weights_hash,
            }
        except ValueError as error:
            raise CheckpointError(
                f"a tokenizer file of {self.name} holds no JSON ({error}). Download it again."
            ) from error
        return contract.contract_hash(facts)

    @cached_property
    def weights_hash(self) -> str:
        """Hex sha256 over the weights of encoder and decoder, however they lie in files."""
        sources = {
            f"{half}.{name}": source
            for half in ("encoder", "decoder")
            for name, source in self._sources(half).items()
        }
        return contract.weights_hash(sources, self._naming_damage)

    @cached_property
    def files_hash(self) -> str:
        """Hex sha256 over the names and contents of the config, tokenizer and weights files."""
        names = ["config.json", *TOKENIZER_FILES, WEIGHTS_INDEX]
        files = [self.path / n for n in names if (self.path / n).exists()] + self._weight_files()
        with ThreadPoolExecutor() as pool:
            digests = pool.map(_sha256, files)
        lines = sorted(f"{f.name} {d}" for f, d in zip(files, digests, strict=True))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def made(self, fingerprint: str, files_hash: str | None) -> bool:
        """Return whether this is the model that made the states of a table.

        Args:
            fingerprint: Fingerprint in the spec of the table.
            files_hash: Hash of all files there. It is None in tables that are older than it; the
                fingerprint of those is that hash.
        """
        return fingerprint == (self.files_hash if files_hash is None else self.fingerprint)

    def tokenizer(self) -> Any:
        """Load the tokenizer from these files.

        Raises:
            CheckpointError: If it cannot be loaded.
        """
        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:  # tokenizers raises plain Exception for a damaged file
            raise CheckpointError(f"cannot load the tokenizer of {self.name}: {error}") from error

    def load_text_encoder(self, device: Device, dtype: Dtype) -> T5Gemma2TextEncoder:
        """Load the text encoder alone: embedding, encoder layers, final norm."""
        return self._load_half(T5Gemma2TextEncoder, "encoder", device, dtype)

    def load_decoder(self, device: Device, dtype: Dtype) -> T5Gemma2Decoder:
        """Load the decoder alone. The model ties its embedding to the LM head, so it is both."""
        return self._load_half(T5Gemma2Decoder, "decoder", device, dtype)

    def _load_half(self, kind: Any, half: str, device: Device, dtype: Dtype) -> Any:
        """Build one half without weights and fill it with copies of the stored ones.

        Raises:
            CheckpointError: If weights are missing, damaged or of other shapes than the config's.
        """
        check_process()
        place = choose_device(device)
        chosen = choose_dtype(dtype, place)
        config = self.config.decoder if half == "decoder" else self.config.encoder.text_config
        with torch.device("meta"):
            model = kind(config, int(self.config.eoi_token_index))
        wanted, found = model.state_dict().keys(), {}
        sources = {name: at for name, at in self._sources(half).items() if name in wanted}
        for file in {file: None for file, _ in sources.values()}:
            with self._naming_damage(file), safe_open(file, framework="pt") as weights:
                for name, (place_of, key) in sources.items():
                    if place_of == file:
                        found[name] = weights.get_tensor(key).to(place, chosen, copy=True)
        if missing := [f"{half}.{name}" for name in wanted if name not in found]:
            raise CheckpointError(
                f"{self.name} has no weight {', '.join(missing)}: it is not a complete KaLM "
                "reranker. Download it again, or check the model id."
            )
        try:
            model.load_state_dict(found, assign=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"the weights of {self.name} do not fit its config.json: {error}"
            ) from error
        # These buffers are derived and not stored, so they are still on the meta device.
        model.rotary_emb = T5Gemma2RotaryEmbedding(model.config)
        model.embed_tokens.embed_scale = torch.tensor(model.embed_tokens.scalar_embed_scale)
        return model.to(place).requires_grad_(False).eval()

    def _sources(self, half: str) -> dict[str, tuple[Path, str]]:
        """Return the file and the key of each stored weight of a half, by its name in the half."""
        found: dict[str, tuple[Path, str]] = {}
        for file in self._weight_files():
            with self._naming_damage(file), safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118 - safe_open is not a mapping
                    stored = STORED_NAME.fullmatch(key)
                    owner, name = stored.groups() if stored else ("", key)
                    # The tied embedding is stored once, under either half.
                    tied = name.startswith("embed_tokens.") and name not in found
                    if (owner == half or tied) and not name.startswith(NOT_TEXT):
                        found[name] = (file, key)
        return found

    @contextmanager
    def _naming_damage(self, file: Path) -> Iterator[None]:
        """Name the file of weights that cannot be read in the `with` block."""
        try:
            yield
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file.name} of {self.name} is damaged ({error}). Download it again."
            ) from error

    def _weight_files(self) -> list[Path]:
        if files := sorted(self.path.glob("*.safetensors")):
            return files
        raise CheckpointError(f"no .safetensors file in {self.name}; no other format is loaded")


ModelName = str | os.PathLike[str] | Checkpoint


def resolve(
    model_name_or_path: ModelName, revision: str | None = None, *, weights: bool = True
) -> Checkpoint:
    """Find a checkpoint: a local directory, `kalm-demo`, or a hub id that is downloaded once.

    Weights, config and tokenizer all come from one snapshot, so a revision pins all three.

    Args:
        model_name_or_path: Hub id or directory; a Checkpoint is returned as it is.
        revision: Revision of the hub id.
        weights: Whether to download the weights too; counting tokens does not need them.

    Raises:
        CheckpointError: If this is neither a directory nor a hub id that can be fetched, or if a
            directory is given with a revision.
    """
    if isinstance(model_name_or_path, Checkpoint):
        return model_name_or_path
    model_name_or_path = os.fspath(model_name_or_path)
    path = Path(model_name_or_path).expanduser()
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
    except (OSError, ValueError) as error:  # huggingface_hub's own errors are of these kinds
        raise CheckpointError(
            f"{model_name_or_path!r} (revision {revision or 'main'}) is not a local directory and "
            f"cannot be fetched from the Hugging Face hub: {first_line(error)}"
        ) from error
    return Checkpoint(Path(snapshot), model_name_or_path, Path(snapshot).name)


def choose_device(device: Device) -> torch.device:
    """Return the wanted device. None chooses the first GPU, or the CPU if there is no GPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device} was asked for, but no CUDA device is available")
    return chosen


def choose_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Return the wanted compute dtype.

    None and "auto" choose bfloat16 on a GPU that has it in hardware, and float32 elsewhere: older
    GPUs emulate it, which is slower than float32. So do they on CPUs that have it in hardware:
    whether a CPU does must not decide what a shard of a table holds, and a cluster may have both.
    The log names the faster choice there.
    """
    if dtype in (None, "auto"):
        if device.type == "cpu" and onednn.BFLOAT16:
            logger.info("this CPU multiplies bfloat16 faster than float32: see --dtype bfloat16")
        return torch.bfloat16 if _has_bfloat16(device) else torch.float32
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return chosen


def _has_bfloat16(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def answer_token_id(tokenizer: Any, answer: str) -> int:
    """Return the id of `yes` or `no`, which must be exactly one token.

    Raises:
        CheckpointError: If it is several tokens, because the score would read the wrong logit.
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
