"""Options that several commands share."""

from typing import Annotated

import typer

from kalm_encoder.errors import InputError

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
