"""Refuses a decoder that does not belong to a table."""

from __future__ import annotations

from kalm_encoder.errors import MismatchError
from kalm_encoder.model.decoder import QueryDecoder
from kalm_encoder.prompts import TEMPLATE
from kalm_encoder.table.reader import PassageTable


def check_match(
    table: PassageTable, decoder: QueryDecoder, *, max_length: int | None = None
) -> None:
    """Refuse a table that this decoder cannot score.

    Raises:
        MismatchError: If they differ; it names the first field, both values and the remedy.
    """
    spec = table.spec
    again = "encode the corpus again"
    expected = [
        ("template", spec.template, TEMPLATE, again),
        ("dim", spec.dim, decoder.dim, f"load {spec.model}, or {again}"),
        ("max_length", spec.max_length, max_length or spec.max_length, again),
    ]
    if not decoder.files.made(spec.fingerprint, spec.files_hash):
        model = f"load the model the table was made with ({spec.model}, revision "
        model += f"{spec.revision or 'local'}), {again} with this one, or try `kalm adopt` if its "
        model += "weights are the same"
        found = decoder.files.fingerprint if spec.files_hash else decoder.files.files_hash
        expected.append(("fingerprint", spec.fingerprint, found, model))
    for field, stored, wanted, remedy in expected:
        if stored != wanted:
            raise MismatchError(
                field, f"{table.uri} has {field} {stored!r}, the query side {wanted!r}: {remedy}"
            )
