"""`kalm plan`: what encoding a corpus will take, from a sample of it, before anything is spent."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.options import (
    Ratios,
    StorageOptions,
    check_folder,
    parse_ratios,
    parse_storage_options,
)
from kalm_encoder.errors import InputError

if TYPE_CHECKING:
    from kalm_encoder.model.checkpoint import Checkpoint
    from pipeline.estimate.flops import Shape
    from pipeline.estimate.rate import Rate
    from pipeline.estimate.sample import Sample

QUERY_TOKENS = 20
MEASURE_S = 20.0


def plan(
    inputs: Annotated[list[str], typer.Argument(help="Corpus files, as in `kalm encode`.")],
    model: Annotated[str, typer.Option(help="Hub id or directory; only its tokenizer is loaded.")],
    revision: Annotated[str | None, typer.Option(help="Revision of the hub id.")] = None,
    ratios: Ratios = "4",
    store_dtype: Annotated[str, typer.Option(help="float16, float32, int8 or int4.")] = "float16",
    max_length: Annotated[int, typer.Option(help="Tokens a passage is cut to.")] = 1024,
    no_text: Annotated[bool, typer.Option("--no-text", help="Do not store the raw text.")] = False,
    shard_size: Annotated[int, typer.Option(help="Rows a shard.")] = 1000,
    passages: Annotated[
        int | None, typer.Option(help="Plan for so many passages like the corpus's.")
    ] = None,
    tokens_per_s: Annotated[
        float | None, typer.Option(help="Tokens a second of one GPU with this model.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time the real encoder on this machine (20 s).")
    ] = False,
    gpus: Annotated[int | None, typer.Option(help="How many GPUs (or machines) work.")] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds to read and tokenise.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    id_field: Annotated[str | None, typer.Option(help="Field that holds the id.")] = None,
    text_field: Annotated[str | None, typer.Option(help="Field that holds the text.")] = None,
    title_field: Annotated[str | None, typer.Option(help="Field that holds the title.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Save all numbers here, for `kalm status --plan`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all numbers as JSON.")] = False,
    storage_option: StorageOptions = None,
) -> None:
    """Sample a corpus and say what encoding it will take: tokens, bytes, hours."""
    check_folder(out)
    from jobs.plan_text import plan_text
    from kalm_encoder.model import checkpoint
    from kalm_encoder.model.encoder import check_max_length
    from kalm_encoder.prompts import render_query
    from kalm_encoder.table.spec import TableSpec

    try:
        from pipeline.corpus.inputs import expand_inputs
        from pipeline.corpus.passages import FieldOptions
        from pipeline.estimate.forecast import Request, forecast
        from pipeline.estimate.sampling import sample_corpus
        from pipeline.estimate.storage import measure_rows
    except ImportError as error:
        raise InputError(
            f"planning needs {error.name}: pip install 'kalm-preencode[batch]'"
        ) from error

    _check(passages, tokens_per_s, measure, gpus, time_limit)
    options = parse_storage_options(storage_option)
    files = checkpoint.resolve(model, revision, weights=measure)
    tokenizer = files.tokenizer()
    check_max_length(max_length, tokenizer, files.config.encoder.text_config)
    spec = TableSpec(
        model=model,
        revision=files.revision,
        fingerprint="",
        dim=files.config.decoder.hidden_size,
        max_length=max_length,
        ratios=parse_ratios(ratios),
        store_dtype=store_dtype,
        keep_text=not no_text,
    )
    sample = sample_corpus(
        expand_inputs(inputs, options),
        tokenizer,
        fields=FieldOptions(id_field, text_field, title_field),
        seconds=time_limit,
        seed=seed,
        storage_options=options,
    )
    name, shapes = _shapes(files)
    request = Request(
        spec=spec,
        model=name,
        shapes=shapes,
        prompt_tokens=len(tokenizer(render_query(""), add_special_tokens=False)["input_ids"])
        + QUERY_TOKENS,
        passages=passages,
        rate=_rate(files, sample, max_length, tokens_per_s, measure),
        gpus=gpus or 1,
    )
    found = forecast(sample, request, measure_rows(spec, sample.examples, shard_size, seed))
    facts = {
        "inputs": inputs,
        "files": sample.num_files,
        "sampled_blocks": len(sample.blocks),
        "sampled_passages": sum(len(block.lengths) for block in sample.blocks),
        "sample_seconds": round(sample.seconds, 2),
        "seed": seed,
        "notes": sample.notes,
        **asdict(found),
    }
    if out:
        out.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    print(json.dumps(facts) if as_json else plan_text(facts))


def _check(
    passages: int | None,
    tokens_per_s: float | None,
    measure: bool,
    gpus: int | None,
    time_limit: float,
) -> None:
    """Refuse numbers that mean nothing, before anything is read."""
    if tokens_per_s is not None and measure:
        raise InputError("give --tokens-per-s or --measure, not both")
    for option, value in (
        ("--passages", passages),
        ("--tokens-per-s", tokens_per_s),
        ("--gpus", gpus),
    ):
        if value is not None and value <= 0:
            raise InputError(f"{option} {value} must be above 0")
    if time_limit < 0:
        raise InputError(f"--time-limit {time_limit} must not be negative")


def _shapes(files: Checkpoint) -> tuple[str, dict[str, Shape]]:
    """Return the name of the planned model, and dimensions of it, Nano, Small and Large."""
    from pipeline.estimate.flops import MODELS, Shape

    shape = Shape.of(files.config.decoder)
    known = [name for name, other in MODELS.items() if other.params == shape.params]
    name = known[0] if known else "this model"
    return name, {**MODELS, name: shape} if known else {name: shape, **MODELS}


def _rate(
    files: Checkpoint,
    sample: Sample,
    max_length: int,
    tokens_per_s: float | None,
    measure: bool,
) -> Rate | None:
    """Return the rate a user entered, or that of the real encoder here, or None."""
    from kalm_encoder.model import checkpoint
    from kalm_encoder.model.encoder import PassageEncoder
    from pipeline.estimate.rate import Rate, measure_rate

    if tokens_per_s is not None:
        return Rate(tokens_per_s, tokens_per_s, tokens_per_s)
    if not measure:
        return None
    place = checkpoint.choose_device(None)
    encoder = PassageEncoder(
        files.load_text_encoder(place, checkpoint.choose_dtype(None, place)),
        files.tokenizer(),
        max_length=max_length,
    )
    return measure_rate(encoder, [passage.text for passage, _ in sample.examples], MEASURE_S)
