"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kalm_encoder.errors import InputError

if TYPE_CHECKING:
    from pipeline.messages import Executor

StorageOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option",
        metavar="K=V",
        help="Object store option, as Lance names it (aws_endpoint=…); may be repeated.",
    ),
]


def parse_storage_options(pairs: list[str] | None) -> dict[str, str] | None:
    """Turn K=V pairs into a mapping.

    Raises:
        InputError: a pair without `=`.
    """
    if not pairs:
        return None
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--storage-option {key!r} must have the form key=value")
        options[key] = value
    return options


def check_folder(file: Path | None) -> None:
    """Refuse a file that cannot be written later, because its folder is not there.

    Raises:
        InputError: names the folder.
    """
    if file is not None and not file.absolute().parent.is_dir():
        raise InputError(f"there is no folder {file.absolute().parent} for {file.name}: make it")


def executor(
    workers: int | None,
    cpus_per_worker: int | None,
    address: str | None,
    *,
    gpus_per_worker: float | None = None,
) -> Executor:
    """Return what encodes shards: Ray workers, or this process where `workers` is 0.

    Raises:
        InputError: the libraries for encoding are not installed.
    """
    try:
        from pipeline.workers.local import encode_inline

        if workers == 0:
            return encode_inline
        from pipeline.workers.on_ray.actor import RayOptions, on_ray
    except ImportError as error:
        raise InputError(
            f"encoding needs {error.name}: pip install 'kalm-preencode[batch]'"
        ) from error
    return on_ray(RayOptions(address, workers, cpus_per_worker, gpus_per_worker))
