"""`kalm evaluate`: what a model's stored states are worth on the user's own judgements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.options import (
    STORE_DTYPES,
    Address,
    Aggregate,
    AsJson,
    Dtype,
    Instruction,
    MaxLength,
    Overlap,
    Revision,
    SystemInstruction,
    compute_dtype,
    executor,
    needs_extra,
    parse_ratios,
    parse_split,
    split_list,
)
from jobs.rerank import parse_cascade
from kalm_encoder.errors import InputError

if TYPE_CHECKING:
    from jobs.evaluation.results import Evaluation

DEMO_RATIOS = "1,2,4,8,16,32,64"


def evaluate(
    context: typer.Context,
    folder: Annotated[
        Path | None, typer.Argument(help="Collection: corpus.jsonl, queries.jsonl, qrels/*.tsv.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or directory of the model.")] = None,
    revision: Revision = None,
    split: Annotated[str, typer.Option(help="Split of the judgements, such as dev.")] = "test",
    corpus: Annotated[
        list[str] | None, typer.Option(help="Corpus files, if you give no collection folder.")
    ] = None,
    queries: Annotated[
        Path | None, typer.Option(help="Queries for --corpus, as JSONL or TSV.")
    ] = None,
    qrels: Annotated[
        Path | None, typer.Option(help="Judgements for --corpus, in BEIR's or TREC's format.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="TREC run file of your own first stage. Default: full-text search."),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(
            help="Candidates per query: what you rerank in production. Default: 100, or 50 "
            "with --demo."
        ),
    ] = None,
    ratios: Annotated[
        str | None, typer.Option(help="Ratios to compare. Default: 4,32, or 1 to 64 with --demo.")
    ] = None,
    store_dtypes: Annotated[
        str, typer.Option(help=f"Types to compare: {STORE_DTYPES}; the first one is encoded.")
    ] = "float16",
    cascade: Annotated[
        list[str] | None, typer.Option(help="Cascade to compare, such as 32:20,4. May be repeated.")
    ] = None,
    fuse: Annotated[bool, typer.Option(help="Also add each reranking to the first stage.")] = True,
    instruction: Instruction = None,
    system_instruction: SystemInstruction = None,
    instructions: Annotated[
        Path | None, typer.Option(help="JSON file that maps collection names to instructions.")
    ] = None,
    dtype: Dtype = "auto",
    max_length: MaxLength = 1024,
    split_tokens: Annotated[
        int | None,
        typer.Option(
            help="Split documents into passages of at most so many tokens, as `kalm encode "
            "--split`, and judge documents."
        ),
    ] = None,
    overlap: Overlap = 0,
    aggregate: Aggregate = "max",
    measure: Annotated[
        list[str] | None, typer.Option(help="Metric as ir-measures spells it. May be repeated.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for tables, TREC run files and results.")
    ] = Path("evaluation"),
    workers: Annotated[
        int | None, typer.Option(help="Ray workers, for a large corpus; 0 uses this process.")
    ] = 0,
    address: Address = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Evaluate the demo model on held-out documentation.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Rank with every ratio, store dtype and cascade asked for, and judge each ranking."""
    execute = executor(context, workers, None, address)
    with needs_extra("batch,eval"):
        from jobs.evaluation import experiment as experiments
        from jobs.evaluation.collection import read_files, read_folder
        from jobs.evaluation.rankings import DEFAULT_MEASURES
        from jobs.evaluation.report import write_report
    if demo:
        if folder is not None or corpus:
            raise InputError("--demo brings its own collection: give no folder and no --corpus")
        from jobs.demo_training.held_out import write_collection
        from kalm_encoder.model.checkpoint import DEMO_NAME

        folder = out / "held-out-documentation"
        write_collection(folder)
        model = model or DEMO_NAME
    if model is None:
        raise InputError("give the model with --model")
    if folder is not None and not (corpus or queries or qrels):
        collection = read_folder(folder, split)
    elif folder is None and corpus and queries and qrels:
        collection = read_files(tuple(corpus), queries, qrels, qrels.stem, split)
    else:
        raise InputError("give a collection's folder, or --corpus, --queries and --qrels")
    if instructions is not None:
        if instruction is not None:
            raise InputError("give --instruction or --instructions, not both")
        instruction = _instruction(instructions, collection.name)
    evaluation = experiments.evaluate(
        experiments.Experiment(
            collection=collection,
            model=model,
            revision=revision,
            folder=out,
            ratios=parse_ratios(ratios or (DEMO_RATIOS if demo else "4,32")),
            store_dtypes=tuple(split_list(store_dtypes)),
            cascades=tuple(tuple(parse_cascade(c)) for c in cascade or ()),
            depth=(50 if demo else 100) if depth is None else depth,
            first_ranking=run,
            fuse=fuse,
            instruction=instruction,
            system_instruction=system_instruction,
            max_length=max_length,
            compute_dtype=compute_dtype(dtype),
            measures=tuple(measure or DEFAULT_MEASURES),
            split=parse_split(split_tokens, overlap, max_length),
            aggregate=aggregate,
        ),
        execute,
    )
    evaluation.write(out / "evaluation.json")
    write_per_query(evaluation, out / "per_query.tsv")
    write_report(evaluation, out / "report.html")
    if as_json:
        print(json.dumps(evaluation.summary()))
        return
    print_evaluation(evaluation)
    print(f"\n{out / 'report.html'} shows it, {out / 'evaluation.json'} has the rest, "
          f"{out / 'runs'} the TREC run files.")  # fmt: skip


def _instruction(file: Path, collection: str) -> str:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return str(found[collection])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} holds no instruction for {collection!r} ({error}): expected JSON "
            f'{{"{collection}": "Given …"}}'
        ) from error


def write_per_query(evaluation: Evaluation, file: Path) -> None:
    """Write setting, query and every metric, one line per setting and query."""
    names = list(evaluation.settings[0].metrics)
    with file.open("w", encoding="utf-8") as lines:
        lines.write("\t".join(["setting", "query", *names]) + "\n")
        for setting in evaluation.settings:
            for query, values in setting.per_query.items():
                cells = [f"{values[name]:.4f}" for name in names]
                lines.write("\t".join([setting.name, query, *cells]) + "\n")


def print_evaluation(evaluation: Evaluation) -> None:
    """Print a line per setting: its metrics, the first one's difference with interval, its cost."""
    names = list(evaluation.settings[0].metrics)
    print(
        f"{evaluation.collection}: {len(evaluation.queries)} queries, "
        f"{evaluation.num_passages:,} passages; {evaluation.first_stage}"
    )
    if evaluation.note:
        print(evaluation.note)
    width = max(len(s.name) for s in evaluation.settings)
    first = evaluation.settings[0].name
    print(f"{'':{width}}  {'  '.join(f'{n:>8}' for n in names)}  against {first}")
    for setting in evaluation.settings:
        means = "  ".join(f"{setting.metrics[n]:8.4f}" for n in names)
        against = ""
        if setting.differences:
            d = setting.differences[names[0]]
            against = f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}] p {d.p:.4f}"
        cost = f"{setting.bytes_per_passage:,.0f} bytes per passage" if setting.ratio else ""
        print(f"{setting.name:{width}}  {means}  {against:38}  {cost}".rstrip())
    for warning in evaluation.warnings:
        print(f"warning: {warning}")
