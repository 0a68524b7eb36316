"""Options that several commands share, each with its help text, and how their values are parsed.

A command names the alias and gives the default. An option that only one command has is declared in
that command.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kalm_encoder.errors import InputError

if TYPE_CHECKING:
    from kalm_encoder.table.cache.disk_cache import DiskCache
    from kalm_encoder.table.location import Location
    from pipeline.corpus.passages import FieldOptions
    from pipeline.messages import Executor

Table = Annotated[str, typer.Argument(help="Path or URL of the table.")]
Version = Annotated[
    str | None, typer.Option(help="Version number or tag to read. Default: the tag `live`.")
]
Model = Annotated[
    str, typer.Option(help="Hub id or directory of a KaLM reranker; kalm-demo is the shipped one.")
]
TableModel = Annotated[
    str | None,
    typer.Option(
        help="Hub id or directory of the model. Give it where the files of the table's model lie "
        "elsewhere on this machine. Default: the model that the table records."
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Revision of the hub id, to pin a commit. Default: the newest.")
]
TableRevision = Annotated[
    str | None, typer.Option(help="Revision of the hub id. Default: the one the table records.")
]
Ratios = Annotated[
    str | None,
    typer.Option(
        "--ratios",
        "--ratio",
        help="Tokens per stored state: a number, or several with commas, finest first. A higher "
        "ratio makes the table smaller and ranks less well. A second ratio is for cascades.",
    ),
]
STORE_DTYPES = "float16, float32, int8 or int4"
StoreDtype = Annotated[
    str,
    typer.Option(
        help=f"Type of the stored numbers: {STORE_DTYPES}. int8 halves the table, int4 quarters "
        "it; float32 is for a model whose states overflow float16."
    ),
]
MaxLength = Annotated[
    int, typer.Option(help="Tokens a passage is cut to. Raise it if many passages are truncated.")
]
NoText = Annotated[
    bool,
    typer.Option(
        "--no-text",
        help="Do not store the raw text. Use it where the text must not leave the corpus; "
        "full-text search then has to come from elsewhere.",
    ),
]
ShardSize = Annotated[
    int,
    typer.Option(
        help="Rows per shard, the unit of work and of commit. Lower it when rows are long, so that "
        "a failed shard costs less; raise it for a corpus of more than a billion rows."
    ),
]
IdField = Annotated[
    str | None, typer.Option(help="Field that holds the id. Give it when detection fails.")
]
TextField = Annotated[
    str | None, typer.Option(help="Field that holds the text. Give it when detection fails.")
]
TitleField = Annotated[
    str | None, typer.Option(help="Field that holds the title, if it is not named `title`.")
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="Format of the files whose names tell none, such as part-00000: jsonl, csv, tsv or "
        "parquet.",
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        help="Names of the columns of CSV and TSV files that have no header, such as "
        "id,title,text. Give it when their first line is a row."
    ),
]
Keep = Annotated[
    str | None,
    typer.Option(
        help="Fields to keep as metadata columns, with commas, for filters and results. A type "
        "may follow, as in lang,year:int64 or 'tags:list<string>'. Default: none; the type that a "
        "column of Parquet or Lance has, and string in text files."
    ),
]
IndexColumns = Annotated[
    list[str] | None,
    typer.Option(
        "--index-column",
        help="Metadata column to index, so that filters by it need not read all rows. May be "
        "repeated. Later syncs keep the index up to date.",
    ),
]
Split = Annotated[
    int | None,
    typer.Option(
        help="Cut documents into passages of at most this many tokens, at ends of sentences and "
        "lines. Give it where documents are longer than --max-length. Default: rows are passages, "
        "and what is too long is cut off."
    ),
]
Overlap = Annotated[
    int,
    typer.Option(
        help="Tokens that a passage of --split repeats of the text before it. Raise it where "
        "passages are hard to understand alone; it is encoded and stored twice."
    ),
]
GroupBy = Annotated[
    str | None,
    typer.Option(
        help="Rank documents: metadata column that names the document of a passage, such as "
        "doc_id, which --split makes."
    ),
]
Aggregate = Annotated[
    Literal["max", "mean_top_2"],
    typer.Option(help="Score of a document: that of its best passage, or the mean of its best 2."),
]
MaxPassages = Annotated[
    int,
    typer.Option(
        help="Passages per document that are scored at the ratio asked for. Raise it where what "
        "matters lies in many places of a document."
    ),
]
Quoting = Annotated[
    bool | None,
    typer.Option(
        "--quoting/--no-quoting",
        help="Whether cells of CSV and TSV files may be quoted as RFC 4180 says, also over several "
        "lines. Give one of them when detection takes the other. Default: yes in CSV; within a "
        "line in TSV with a header; no in TSV without one.",
    ),
]
OnDuplicate = Annotated[
    str, typer.Option(help="If an id occurs twice: error, or keep the first or the last row.")
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Ray workers. Lower it to leave room for other jobs; 0 encodes in this process, "
        "without Ray. Default: as many as the cluster has room for."
    ),
]
CpusPerWorker = Annotated[
    int | None,
    typer.Option(
        help="CPUs per worker. Beside a GPU they read, tokenise and write: raise it if "
        "`kalm status` shows an idle device. On CPUs alone, raise it if a node has too little "
        "memory for many workers. Default: the GPU's share of the CPUs of its node, up to 16; "
        "without GPUs up to 4."
    ),
]
GpusPerWorker = Annotated[
    float | None,
    typer.Option(
        help="GPUs per worker, at most 1. A share such as 0.5 puts two workers on one GPU, for a "
        "small model; 0 uses CPUs alone. Default: 1 if there is any GPU."
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="Address of a running Ray cluster. Default: RAY_ADDRESS, or else a new cluster on "
        "this machine."
    ),
]
StepWorkers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        help="Ray workers. Lower it to leave room for other jobs; 0 does all in this process, "
        "without Ray. Default: as many as the cluster has room for; a table of a few gigabytes is "
        "done in this process, and so is every table where Ray is not installed.",
    ),
]
StepCpusPerWorker = Annotated[
    int | None,
    typer.Option(
        "--cpus-per-worker",
        help="CPUs per worker. Raise it if a node has too little memory for as many workers as it "
        "has CPUs. Default: 1.",
    ),
]
Instruction = Annotated[
    str | None,
    typer.Option(
        help="Task in words, for the prompt. Scores depend on it: give the one that fits your "
        "queries. Default: the model's general retrieval task."
    ),
]
SystemInstruction = Annotated[
    str | None,
    typer.Option(
        help="What the model is told before the task. Change it only to repeat scores that were "
        "made with another one. Default: what the model was trained with."
    ),
]
Host = Annotated[
    str, typer.Option(help="Address to listen at. 0.0.0.0 lets other machines connect.")
]
Port = Annotated[
    int, typer.Option(help="Port to listen at. Change it when another program has it.")
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Device of the decoder, such as cuda:1. Default: the first GPU, else the CPU."
    ),
]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float32"],
    typer.Option(
        help="Type the model computes in. auto: what the table records when it encodes more of it, "
        "otherwise bfloat16 on a GPU that has it in hardware, and float32 elsewhere. bfloat16 is "
        "several times faster on CPUs with AMX too; float32 is exact."
    ),
]
HotMb = Annotated[
    int,
    typer.Option(
        help="Megabytes of memory for passages that are asked for again and again. Raise it when "
        "requests share many candidates."
    ),
]
DiskCacheFolder = Annotated[
    Path | None,
    typer.Option(
        "--disk-cache",
        help="Folder on a local disk for a cache of states. Give it where the table is on an "
        "object store. Several processes may share it.",
    ),
]
DiskCacheGb = Annotated[
    float | None,
    typer.Option(help="Most gigabytes of the disk cache. Processes that share one give the same."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for a script.")]
StorageOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option",
        metavar="K=V",
        help="Option of the object store, as Lance names it, such as aws_endpoint=https://…. May "
        "be repeated. Give it when the environment does not say how to reach the store.",
    ),
]


def parse_storage_options(pairs: list[str] | None) -> dict[str, str] | None:
    """Turn K=V pairs into a mapping.

    Raises:
        InputError: If a pair has no `=`.
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


def open_disk_cache(folder: Path | None, gigabytes: float | None) -> DiskCache | None:
    """Return the disk cache in a folder; None if no folder is given.

    Raises:
        InputError: If only one of both is given, or the cache cannot be used.
    """
    from kalm_encoder.table.cache.disk_cache import DiskCache

    if folder is None and gigabytes is None:
        return None
    if folder is None or gigabytes is None:
        raise InputError("a disk cache needs both --disk-cache DIR and --disk-cache-gb N")
    return DiskCache(folder, int(gigabytes * 1e9))


def location(uri: str, pairs: list[str] | None) -> Location:
    """Return where a table lies, from its address and the K=V pairs of --storage-option.

    Raises:
        InputError: If a pair has no `=`.
    """
    from kalm_encoder.table.location import Location

    return Location(uri, parse_storage_options(pairs))


def reading(
    id_field: str | None,
    text_field: str | None,
    title_field: str | None,
    columns: str | None,
    quoting: bool | None,
    format: str | None,
    keep: str | None = None,
) -> FieldOptions:
    """Return what the user said of how files are read.

    Raises:
        InputError: If a name of a column is empty or there twice, or a column cannot be kept.
    """
    from kalm_encoder.table.metadata import check_columns
    from pipeline.corpus.passages import FieldOptions

    names = tuple(columns.split(",")) if columns is not None else None
    if names and ("" in names or len(set(names)) < len(names)):
        raise InputError(
            f"--columns {columns!r} must be different names with commas, such as id,title,text"
        )
    pairs = (part.partition(":") for part in split_list(keep or ""))
    kept = tuple((name, type if colon else None) for name, colon, type in pairs)
    if keep is not None and not kept:
        raise InputError("--keep is empty: name the fields to keep, or leave it out")
    check_columns(kept)
    return FieldOptions(id_field, text_field, title_field, format, names, quoting, kept)


def parse_ratios(ratios: str) -> tuple[int, ...]:
    """Turn `4` into (4,) and `4,32` into (4, 32).

    Raises:
        InputError: If a part is not a number.
    """
    try:
        return tuple(int(part) for part in ratios.split(","))
    except ValueError:
        raise InputError(f"--ratios {ratios!r} must be numbers with commas, such as 4,32") from None


def parse_split(split: int | None, overlap: int, max_length: int) -> tuple[int, int] | None:
    """Return the lengths of --split and --overlap; None if documents are not split.

    Raises:
        InputError: If documents cannot be split like that.
    """
    from kalm_encoder.table.spec import check_split

    if split is None:
        if overlap:
            raise InputError(f"--overlap {overlap} is of passages that --split makes: give both")
        return None
    check_split(split, overlap, max_length)
    return split, overlap


def split_list(text: str) -> list[str]:
    """Split a list with commas; spaces around an entry, and empty entries, do not count."""
    return [entry for part in text.split(",") if (entry := part.strip())]


def compute_dtype(dtype: str) -> str | None:
    """Return the dtype that --dtype names, None for auto."""
    return None if dtype == "auto" else dtype


def read_ids(file: Path) -> list[str]:
    """Read a file with one id per line.

    Only a line feed ends a line, with or without a carriage return before it, so an id may hold
    every other character. A byte order mark and empty lines do not count.

    Raises:
        InputError: If the file cannot be read or is not UTF-8.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {file}: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 ({error}): convert it to UTF-8") from error
    return [line for part in text.split("\n") if (line := part.removesuffix("\r"))]


def parse_version(version: str | None) -> int | str | None:
    """Turn a version number into an int; a tag stays a string, None stays None."""
    return int(version) if version is not None and version.isdigit() else version


def check_folder(file: Path | None) -> None:
    """Refuse a file that could not be written later because its folder does not exist.

    Raises:
        InputError: If the folder does not exist; the message names it.
    """
    if file is not None and not file.absolute().parent.is_dir():
        raise InputError(f"there is no folder {file.absolute().parent} for {file.name}: make it")


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turn a failed import in the `with` block into the command that installs the library.

    Args:
        extra: Names of the extras that bring the library, such as `batch,eval`.

    Raises:
        InputError: If a library is missing.
    """
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"this command needs {error.name}: pip install 'kalm-preencode[{extra}]'"
        ) from error


def executor(
    context: typer.Context,
    workers: int | None,
    cpus_per_worker: int | None,
    address: str | None,
    *,
    gpus_per_worker: float | None = None,
    is_step: bool = False,
) -> Executor:
    """Return what does the work: on Ray, or in this process if `workers` is 0.

    Where Ray is not installed, what needs no model (`is_step`) runs in this process, unless workers
    were asked for. All steps of a command share one connection to Ray, which ends with the command.

    Raises:
        InputError: If the libraries for encoding are not installed.
    """
    with needs_extra("batch"):
        from pipeline.workers.local import in_process

        if workers == 0:
            return in_process
        if is_step and not (workers or address or find_spec("ray")):
            return in_process
        from pipeline.workers.on_ray.actor import OnRay, RayOptions
    on_ray = OnRay(RayOptions(address, workers, cpus_per_worker, gpus_per_worker))
    return context.with_resource(on_ray)
