"""What of a checkpoint decides states and scores, and nothing else of it.

A table belongs to its model by a hash over this. A chat template, a comment or a field that nobody
reads may change without making a table useless.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

CONFIG_FIELDS = (
    "attention_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
    "hidden_activation",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "vocab_size",
)
"""Fields of the configuration of a half that its forward reads, here or in transformers."""
TOKENIZER_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "model", "decoder")
"""Parts of tokenizer.json that decide ids and what ids read as. No special token is ever added, so
the post-processor does nothing, and what the file says of lengths is not used."""
TOKENIZER_FIELDS = (
    *("add_prefix_space", "added_tokens_decoder", "additional_special_tokens", "bos_token"),
    *("cls_token", "do_lower_case", "eos_token", "extra_special_tokens", "legacy", "mask_token"),
    *("pad_token", "sep_token", "split_special_tokens", "tokenizer_class", "unk_token"),
)
"""Fields of tokenizer_config.json that do."""
ADDED_TOKENS = ("added_tokens.json", "special_tokens_map.json")
"""Small files of the tokenizer that are read whole."""
SENTENCEPIECE = "tokenizer.model"
"""The vocabulary of a checkpoint without tokenizer.json."""

Sources = Mapping[str, tuple[Path, str]]
"""The file and the key under which each weight is stored, by its name in the model."""


def config_facts(config: Any) -> dict[str, Any]:
    """Return what is read of the configuration of a whole model (T5Gemma2Config)."""
    halves = {"encoder": config.encoder.text_config, "decoder": config.decoder}
    facts: dict[str, Any] = {"eoi_token_index": int(config.eoi_token_index)}
    for half, fields in halves.items():
        known = fields.to_dict()
        facts[half] = {name: known.get(name) for name in CONFIG_FIELDS}
    return facts


def tokenizer_facts(folder: Path) -> dict[str, Any]:
    """Return what the files of a tokenizer say about the ids of texts."""
    facts: dict[str, Any] = {}
    for name in ADDED_TOKENS:
        if (file := folder / name).exists():
            facts[name] = json.loads(file.read_text(encoding="utf-8"))
    if (file := folder / "tokenizer_config.json").exists():
        config = json.loads(file.read_text(encoding="utf-8"))
        facts["config"] = {name: config[name] for name in TOKENIZER_FIELDS if name in config}
    if (file := folder / "tokenizer.json").exists():
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        facts["tokenizer"] = {name: tokenizer.get(name) for name in TOKENIZER_PARTS}
    elif (file := folder / SENTENCEPIECE).exists():
        facts[SENTENCEPIECE] = hashlib.sha256(file.read_bytes()).hexdigest()
    return facts


def weights_hash(
    sources: Sources, naming_damage: Callable[[Path], AbstractContextManager[None]]
) -> str:
    """Return the hex sha256 over name, dtype, shape and bytes of each weight, in whatever file.

    Args:
        sources: Where the weights are.
        naming_damage: Context that names a file which cannot be read.
    """
    by_file: dict[Path, set[str]] = {}
    for file, key in sources.values():
        by_file.setdefault(file, set()).add(key)
    digests: dict[tuple[Path, str], str] = {}
    for file, keys in by_file.items():
        with (
            naming_damage(file),
            safe_open(file, framework="pt") as weights,
            ThreadPoolExecutor() as pool,
        ):
            ordered = sorted(keys)
            found = pool.map(_digest, map(weights.get_tensor, ordered))
            digests |= {(file, key): digest for key, digest in zip(ordered, found, strict=True)}
    lines = sorted(f"{name} {digests[source]}" for name, source in sources.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def contract_hash(facts: Mapping[str, Any]) -> str:
    """Return the hex sha256 over facts, which are JSON values."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(tensor: torch.Tensor) -> str:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"
