"""Safetensors files of a checkpoint: what is in them, and tensors out of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from kalm_encoder.errors import CheckpointError


def weight_index(files: Iterable[Path], model: str) -> dict[str, tuple[Path, str]]:
    """Map normalised weight names to (file, name in file).

    Names on disk may begin with `model.` and may say `encoder.text_model.` for `encoder.`.

    Raises:
        CheckpointError: a file is damaged; names it and the model.
    """
    index = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118 - safe_open is no mapping
                    short = key.removeprefix("model.")
                    index[short.replace("encoder.text_model.", "encoder.", 1)] = (file, key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file.name} of {model} is damaged ({error}). Download it again."
            ) from error
    return index


def read_tensors(
    wanted: Mapping[str, tuple[Path, str]], device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Read {name: (file, key)} onto `device`; each tensor is a copy that owns its memory."""
    tensors = {}
    for file in sorted({file for file, _ in wanted.values()}):
        with safe_open(file, framework="pt") as weights:
            for name, (where, key) in wanted.items():
                if where == file:
                    tensors[name] = weights.get_tensor(key).to(device, dtype, copy=True)
    return tensors
