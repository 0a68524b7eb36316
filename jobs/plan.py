"""`kalm plan`: what encoding a corpus will take, from a sample of it, before anything is spent."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from jobs.options import (
    AsJson,
    Columns,
    Format,
    IdField,
    Keep,
    MaxLength,
    NoText,
    Overlap,
    Quoting,
    Ratios,
    Revision,
    Split,
    StorageOptions,
    StoreDtype,
    TextField,
    TitleField,
    check_folder,
    needs_extra,
    parse_ratios,
    parse_split,
    parse_storage_options,
    reading,
)
from kalm_encoder.errors import InputError

QUERY_TOKENS = 20
"""Tokens of the question in a query's prompt."""
MEASURE_S = 20.0
"""Seconds that --measure spends."""


def plan(
    inputs: Annotated[list[str], typer.Argument(help="Corpus files, as in `kalm encode`.")],
    model: Annotated[str, typer.Option(help="Hub id or directory; only its tokenizer is loaded.")],
    revision: Revision = None,
    ratios: Ratios = "4",
    store_dtype: StoreDtype = "float16",
    max_length: MaxLength = 1024,
    no_text: NoText = False,
    passages: Annotated[
        int | None, typer.Option(help="Estimate for this many passages like those of the corpus.")
    ] = None,
    tokens_per_s: Annotated[
        float | None, typer.Option(help="Tokens per second of one GPU, if you know it.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time the real encoder on this machine for 20 s.")
    ] = False,
    gpus: Annotated[int, typer.Option(help="Number of GPUs (or machines) that encode.")] = 1,
    time_limit: Annotated[
        float, typer.Option(help="Seconds to read and tokenise; more of them narrow the intervals.")
    ] = 30.0,
    seed: Annotated[int, typer.Option(help="Another seed draws another sample.")] = 0,
    id_field: IdField = None,
    text_field: TextField = None,
    title_field: TitleField = None,
    format: Format = None,
    columns: Columns = None,
    quoting: Quoting = None,
    keep: Keep = None,
    split: Split = None,
    overlap: Overlap = 0,
    out: Annotated[
        Path | None, typer.Option(help="Save all numbers here, for `kalm status --plan`.")
    ] = None,
    as_json: AsJson = False,
    storage_option: StorageOptions = None,
) -> None:
    """Estimate from a sample what encoding a corpus will take: tokens, bytes and hours."""
    check_folder(out)
    if tokens_per_s is not None and measure:
        raise InputError("give --tokens-per-s or --measure, not both")
    numbers = {"--passages": passages, "--tokens-per-s": tokens_per_s, "--gpus": gpus}
    for option, value in numbers.items():
        if value is not None and value <= 0:
            raise InputError(f"{option} {value} must be above 0")
    if time_limit < 0:
        raise InputError(f"--time-limit {time_limit} must not be negative")
    from kalm_encoder.model import checkpoint
    from kalm_encoder.model.encoder import PassageEncoder
    from kalm_encoder.model.tokens import check_max_length
    from kalm_encoder.prompts import render_query
    from kalm_encoder.table.spec import TableSpec

    with needs_extra("batch"):
        from jobs.plan_text import print_estimate
        from pipeline.corpus.inputs import expand_inputs
        from pipeline.corpus.splitting import Splitter
        from pipeline.estimate.estimate import estimate
        from pipeline.estimate.flops import MODELS, Dimensions
        from pipeline.estimate.rate import Rate, measure_rate
        from pipeline.estimate.sampling import sample_corpus

    options = parse_storage_options(storage_option)
    files = checkpoint.resolve(model, revision, weights=measure)
    tokenizer = files.tokenizer()
    check_max_length(max_length, tokenizer, files.config.encoder.text_config)
    dimensions = Dimensions.of(files.config.decoder)
    same = (name for name, known in MODELS.items() if known.params == dimensions.params)
    name = next(same, "this model")
    spec = TableSpec(
        model=model,
        revision=files.revision,
        fingerprint="",
        dim=dimensions.hidden,
        max_length=max_length,
        ratios=parse_ratios(ratios),
        store_dtype=store_dtype,
        keep_text=not no_text,
        split=parse_split(split, overlap, max_length),
    )
    fields = reading(id_field, text_field, title_field, columns, quoting, format, keep)
    corpus = expand_inputs(inputs, options, format)
    sample = sample_corpus(
        corpus,
        tokenizer,
        fields=fields,
        seconds=time_limit,
        seed=seed,
        split=Splitter.of(spec, tokenizer),
        storage_options=options,
    )
    rate = Rate(tokens_per_s, tokens_per_s, tokens_per_s) if tokens_per_s else None
    if measure:
        encoder = PassageEncoder(files, max_length=max_length)
        rate = measure_rate(encoder, sample.examples, MEASURE_S)
    facts = {
        "inputs": inputs,
        "files": len(corpus),
        "sampled_blocks": len(sample.sizes),
        "sampled_passages": len(sample.lengths),
        "sample_seconds": round(sample.seconds, 2),
        "seed": seed,
        "readings": sample.readings,
        "notes": sample.notes,
        **estimate(
            sample,
            spec,
            seed,
            models={name: dimensions} | MODELS,
            model=name,
            prompt_tokens=QUERY_TOKENS
            + len(tokenizer(render_query(""), add_special_tokens=False)["input_ids"]),
            passages=passages,
            rate=rate,
            gpus=gpus,
        ),
    }
    if out:
        out.write_text(json.dumps(facts, default=asdict) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(facts, default=asdict))
    else:
        print_estimate(facts)
