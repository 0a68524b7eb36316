"""Runs an evaluation: encode once, rank with every setting, judge the TREC run files written.

What is scored is what production reads: stored states of each ratio and dtype in a column of their
own, through `Reranker`.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pyarrow.compute as pc
import xxhash

from jobs.evaluation.collection import Collection
from jobs.evaluation.judging import (
    Ranking,
    examples,
    fused_ranking,
    gaps,
    ranking_scores,
    with_metrics,
)
from jobs.evaluation.rankings import (
    DEFAULT_MEASURES,
    Scores,
    metrics_per_query,
    read_ranking,
    write_ranking,
)
from jobs.evaluation.results import Evaluation, SettingResult
from kalm_encoder.errors import InputError, TableError
from kalm_encoder.model import checkpoint
from kalm_encoder.model.decoder import QueryDecoder
from kalm_encoder.prompts import DEFAULT_INSTRUCTION, DEFAULT_SYSTEM_INSTRUCTION
from kalm_encoder.rerank.cascade import Stage, coarse_ratio
from kalm_encoder.rerank.grouping import MAX_PASSAGES, Aggregate
from kalm_encoder.rerank.reranker import Reranker
from kalm_encoder.table.reader import PassageTable
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.access import absolute
from pipeline.messages import Executor
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.upkeep.sync import sync
from pipeline.upkeep.truncate import truncate

logger = logging.getLogger(__name__)

SEARCHED_PASSAGES = 4
"""Passages that are searched per document wanted, as several may be of one document."""
Stages = tuple[Stage, ...]
"""A cascade, as `Reranker.rerank` takes it; one stage for a single ratio."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The settings of an evaluation.

    Attributes:
        collection: Queries, judgements and where the passages are.
        model: Hub id or directory of the checkpoint.
        revision: Revision of the hub id.
        folder: Folder for tables, TREC run files and results.
        ratios: Ratios to store and to score.
        store_dtypes: Types to store. The first is encoded, the others are made from it.
        cascades: Cascades to score, each with every dtype.
        depth: Number of candidates per query, from the full-text search or the given ranking.
        first_ranking: TREC run file to take candidates from; None searches the stored texts (BM25).
        fuse: Whether to also add each reranking to the first stage (kalm_encoder.rerank.fusion).
        instruction: The task; None takes the default of the model.
        system_instruction: What the model is told before the task; None takes its default.
        max_length: Number of tokens to which a passage is cut.
        compute_dtype: Dtype in which encoder and decoder compute; None takes what suits the device.
        measures: Metrics as ir-measures spells them; settings are compared by the first.
        split: Most tokens of a passage and tokens of overlap: documents are split into passages,
            and documents are ranked and judged. None takes rows as passages.
        aggregate: What gives the score of a document that was split: "max" or "mean_top_2".
    """

    collection: Collection
    model: str
    revision: str | None = None
    folder: Path
    ratios: tuple[int, ...] = (4, 32)
    store_dtypes: tuple[str, ...] = ("float16",)
    cascades: tuple[Stages, ...] = ()
    depth: int = 100
    first_ranking: Path | None = None
    fuse: bool = True
    instruction: str | None = None
    system_instruction: str | None = None
    max_length: int = 1024
    compute_dtype: str | None = None
    measures: tuple[str, ...] = DEFAULT_MEASURES
    split: tuple[int, int] | None = None
    aggregate: Aggregate = "max"

    def __post_init__(self) -> None:
        if self.split and self.cascades:
            raise InputError("a cascade keeps passages, not documents: leave out --cascade")
        if self.depth < 1:
            raise InputError(f"depth {self.depth} must be at least 1")


def evaluate(experiment: Experiment, execute: Executor) -> Evaluation:
    """Encode what is not encoded, rank, judge.

    Args:
        experiment: What to evaluate.
        execute: Encodes passages; see `pipeline.run.driver`.

    Returns:
        The evaluation. TREC run files of all settings are in `folder`/runs.

    Raises:
        InputError: The input is bad, or none of the candidates is stored.
        KalmError: As `pipeline.run.driver.run`.
    """
    collection = experiment.collection
    files = checkpoint.resolve(experiment.model, experiment.revision)
    tables = _tables(experiment, files.fingerprint, execute)
    table = tables[experiment.store_dtypes[0]]
    found, name, label = _first_stage(experiment, table)
    relevant = {i for q in collection.judgements.values() for i, r in q.items() if r > 0}
    # Two light columns are scanned: a filter that names a million candidates would be too long.
    # Only what is asked for is kept, as a corpus may hold far more passages than the candidates.
    wanted = relevant.union(*found.values())
    lengths: dict[str, list[int]] = {}  # of each passage of a candidate
    num_tokens = 0
    id = "doc_id" if experiment.split else "id"
    for batch in table.dataset.to_batches(columns=[id, "num_tokens"]):
        num_tokens += pc.sum(batch["num_tokens"]).as_py() or 0
        for i, n in zip(batch[id].to_pylist(), batch["num_tokens"].to_pylist(), strict=True):
            if i in wanted:
                lengths.setdefault(i, []).append(n)
    first = {q: {i: s for i, s in scores.items() if i in lengths} for q, scores in found.items()}
    if not any(first.values()):
        raise InputError(
            f"{label} found no stored passage for any query. Full-text search splits at spaces: "
            "where the language has none, give the candidates of another first stage with --run"
        )
    start = _judge(experiment, Ranking(SettingResult(name=name, kind="first stage"), first), None)
    rankings = [start]
    decoder = QueryDecoder(
        experiment.model, revision=experiment.revision, dtype=experiment.compute_dtype
    )
    for dtype in experiment.store_dtypes:
        reranker = Reranker(tables[dtype], decoder, max_length=experiment.max_length)
        suffix = "" if dtype == experiment.store_dtypes[0] else f"-{dtype}"
        for stages in [((ratio, None),) for ratio in experiment.ratios] + list(experiment.cascades):
            ranking, margins = _rank(experiment, reranker, stages, first, lengths, suffix)
            rankings.append(_judge(experiment, ranking, start.setting))
            if experiment.fuse and not suffix and len(stages) == 1:
                fused = fused_ranking(ranking.setting, start, margins)
                rankings.append(_judge(experiment, fused, start.setting))
    helped, hurt = examples(collection, table, rankings)
    return Evaluation(
        collection=collection.name,
        split=collection.split,
        model=table.spec.model.rstrip("/").rsplit("/", 1)[-1],
        fingerprint=table.spec.fingerprint,
        note=checkpoint.DEMO_NOTE if files.path == checkpoint.DEMO_CHECKPOINT else "",
        first_stage=label,
        instruction=_or_default(experiment.instruction, DEFAULT_INSTRUCTION),
        system_instruction=_or_default(experiment.system_instruction, DEFAULT_SYSTEM_INSTRUCTION),
        num_passages=len(table),
        num_tokens=num_tokens,
        queries=collection.queries,
        settings=[ranking.setting for ranking in rankings],
        scores=[ranking_scores(r, collection) for r in rankings if r.setting.kind == "reranked"],
        helped=helped,
        hurt=hurt,
        warnings=[*collection.warnings, *gaps(found, first, relevant, lengths)],
    )


def _or_default(given: str | None, default: str) -> str:
    return default if given is None else given


def _tables(experiment: Experiment, fingerprint: str, execute: Executor) -> dict[str, PassageTable]:
    """Return a table per dtype, up to date with the corpus."""
    of_cascades = {ratio for stages in experiment.cascades for ratio, _ in stages}
    ratios = tuple(sorted(of_cascades | set(experiment.ratios)))
    first, *others = experiment.store_dtypes
    name = re.sub(r"[^a-zA-Z0-9_-]", "-", experiment.collection.name)
    files_read = "\n".join(map(absolute, experiment.collection.corpus))
    place = xxhash.xxh3_64_hexdigest(files_read.encode())[:6]
    settings = f"r{'-'.join(map(str, ratios))}-l{experiment.max_length}"
    settings += f"-{experiment.compute_dtype}" if experiment.compute_dtype else ""
    settings += "-s{}-{}".format(*experiment.split) if experiment.split else ""
    # Another collection, model or setting has tables of its own.
    stem = f"{name}-{place}-{fingerprint[:8]}-{settings}"
    base = experiment.folder / "states" / f"{stem}-{first}.lance"
    job = EncodeJob(
        inputs=experiment.collection.corpus, uri=str(base), model=experiment.model,
        revision=experiment.revision, ratios=ratios, store_dtype=first,
        compute_dtype=experiment.compute_dtype, max_length=experiment.max_length,
        split=experiment.split,
    )  # fmt: skip
    try:
        PassageTable.open(job.uri)
    except TableError:
        run(job, execute)
    else:
        sync(job, execute, delete_missing=True)
    tables = {first: PassageTable.open(job.uri)}
    for dtype in others:
        uri = base.with_name(f"{stem}-{dtype}-of-{tables[first].version}.lance")
        for stale in base.parent.glob(f"{stem}-{dtype}-of-*.lance"):
            if stale != uri:
                shutil.rmtree(stale)
        truncate(job.uri, str(uri), store_dtype=dtype)
        tables[dtype] = PassageTable.open(str(uri))
    return tables


def _first_stage(experiment: Experiment, table: PassageTable) -> tuple[Scores, str, str]:
    """Return candidates with scores, best first; the name of the setting; and what found them."""
    queries, depth, file = experiment.collection.queries, experiment.depth, experiment.first_ranking
    if file is None:
        if experiment.split:
            found = {q: _documents(table, text, depth) for q, text in queries.items()}
            return (
                found,
                "bm25",
                f"BM25 of passages, top {depth} documents",
            )
        found = {query: dict(table.search(text, depth)) for query, text in queries.items()}
        return found, "bm25", f"BM25 (Lance full-text search), top {depth}"
    scores, tag = read_ranking(file)
    tag = f"first-{tag}" if re.match(r"r\d", tag) else tag  # a setting of ours has that name
    cut = {query: dict(list(scores.get(query, {}).items())[:depth]) for query in queries}
    return cut, tag, f"{tag} ({file.name}), top {depth}"


def _documents(table: PassageTable, text: str, depth: int) -> dict[str, float]:
    """Return the documents of the best passages; each has the score of its best."""
    best: dict[str, float] = {}
    for id, score in table.search(text, SEARCHED_PASSAGES * depth):
        best.setdefault(id.rpartition("#")[0], score)
    return dict(islice(best.items(), depth))


def _read_bytes(spec: TableSpec, lengths: Sequence[int], ratio: int) -> int:
    """Return the bytes that scoring a candidate reads; of a long document about that many.

    Args:
        spec: Spec of the table.
        lengths: Tokens of each of its passages.
        ratio: Ratio that is asked for.
    """
    read = sum(spec.read_bytes(n, ratio) for n in lengths)
    if len(lengths) <= MAX_PASSAGES:
        return read
    coarse = max(coarse_ratio(spec), ratio)  # the best passages are chosen at this one
    chosen = read * MAX_PASSAGES // len(lengths)
    return chosen + sum(spec.read_bytes(n, coarse) for n in lengths)


def _rank(
    experiment: Experiment,
    reranker: Reranker,
    stages: Stages,
    candidates: Scores,
    lengths: Mapping[str, Sequence[int]],
    suffix: str,
) -> tuple[Ranking, Scores]:
    """Rerank the candidates of all queries with one setting; return the ranking and the margins."""
    ranked, margins, took_ms = {}, {}, []
    read_bytes = 0
    for query, text in experiment.collection.queries.items():
        left = list(candidates[query])
        began = time.perf_counter()
        results = reranker.rerank(
            text,
            left,
            instruction=experiment.instruction,
            system_instruction=experiment.system_instruction,
            cascade=stages,
            group_by="doc_id" if experiment.split else None,
            aggregate=experiment.aggregate,
        )
        took_ms.append(1000 * (time.perf_counter() - began))
        ranked[query] = {result.id: result.score for result in results}
        margins[query] = {result.id: result.margin for result in results}
        for ratio, keep in stages:
            read_bytes += sum(_read_bytes(reranker.table.spec, lengths[i], ratio) for i in left)
            left = list(ranked[query])[:keep]
    name = "r" + ",".join(f"{ratio}:{keep}" if keep else str(ratio) for ratio, keep in stages)
    logger.info("%s: %d queries in %.0f s", name + suffix, len(ranked), sum(took_ms) / 1000)
    scored = [sum(lengths[i]) for ids in candidates.values() for i in ids]
    setting = SettingResult(
        name=name + suffix,
        kind="reranked" if len(stages) == 1 else "cascade",
        ratio=stages[-1][0],
        store_dtype=reranker.table.spec.store_dtype,
        bytes_per_passage=read_bytes / len(scored),
        bytes_per_token=read_bytes / max(1, sum(scored)),
        ms_per_query=took_ms,
    )
    return Ranking(setting, ranked), margins


def _judge(experiment: Experiment, ranking: Ranking, first: SettingResult | None) -> Ranking:
    """Write a ranking as a TREC run file and return it with the metrics of that file."""
    folder, setting = experiment.folder / "runs", ranking.setting
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{re.sub(r'[^a-zA-Z0-9._+,-]', '-', setting.name)}.trec"
    write_ranking(file, ranking.ranked, setting.name)
    values = metrics_per_query(experiment.collection.judgements, file, experiment.measures)
    return replace(ranking, setting=with_metrics(setting, values, first))
