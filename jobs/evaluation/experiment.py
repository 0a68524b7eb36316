"""Runs an evaluation: encode once, rank with every setting, judge the run files that were written.

What is scored is what production reads: stored states of each ratio and dtype in a column of their
own, through `Reranker`.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import xxhash

from jobs.evaluation import metrics
from jobs.evaluation.collection import Collection
from jobs.evaluation.judging import Ranking, evaluation_of
from jobs.evaluation.results import Evaluation
from jobs.evaluation.runs import Run, read_run, write_run
from kalm_encoder.errors import InputError, TableError
from kalm_encoder.model import checkpoint
from kalm_encoder.model.decoder import QueryDecoder
from kalm_encoder.prompts import DEFAULT_INSTRUCTION
from kalm_encoder.rerank.cascade import Stage
from kalm_encoder.rerank.fusion import fuse
from kalm_encoder.rerank.reranker import Reranker, RerankResult
from kalm_encoder.table.reader import PassageTable
from pipeline.corpus.inputs import absolute
from pipeline.messages import Executor
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.upkeep.sync import sync
from pipeline.upkeep.truncate import truncate

logger = logging.getLogger(__name__)

Stages = tuple[Stage, ...]
"""A cascade, as `Reranker.rerank` takes it."""
IDS_AT_ONCE = 10_000


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to evaluate.

    Attributes:
        collection: queries, judgements and where the passages are.
        model: hub id or directory.
        revision: of the hub id.
        folder: where tables, runs and results go.
        ratios: each is stored and scored.
        store_dtypes: the first is encoded, the others are made from it.
        cascades: each is scored with each dtype.
        depth: candidates a query, of the full-text search or the run.
        first_run: a TREC run to take candidates from; None searches the stored texts (BM25).
        fuse: also add each reranking to the first stage (see `kalm_encoder.rerank.fusion`).
        instruction: the task; None takes the model's default.
        max_length: tokens a passage is cut to.
        measures: as ir-measures spells them; settings are compared by the first.
        note: what the reader of a report must know of the model.
    """

    collection: Collection
    model: str
    revision: str | None = None
    folder: Path
    ratios: tuple[int, ...] = (4, 32)
    store_dtypes: tuple[str, ...] = ("float16",)
    cascades: tuple[Stages, ...] = ()
    depth: int = 100
    first_run: Path | None = None
    fuse: bool = True
    instruction: str | None = None
    max_length: int = 1024
    measures: tuple[str, ...] = metrics.DEFAULT
    note: str = ""

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise InputError(f"depth {self.depth} must be at least 1")


@dataclass
class _Costs:
    """Bytes and milliseconds of reranking, by what was read."""

    tokens: Mapping[str, int]
    candidates: Mapping[str, Sequence[str]]

    def read(
        self, table: PassageTable, results: Mapping[str, Sequence[RerankResult]], stages: Stages
    ) -> int:
        """Return the state bytes that all queries' stages read."""
        total = 0
        for query, ids in self.candidates.items():
            left: Sequence[str] = ids
            ranked = [result.id for result in results[query]]
            for ratio, keep in stages:
                total += sum(table.spec.read_bytes(self.tokens[i], ratio) for i in left)
                left = ranked[:keep]
        return total

    @cached_property
    def num_candidates(self) -> int:
        """Of all queries."""
        return sum(map(len, self.candidates.values()))

    @cached_property
    def num_tokens(self) -> int:
        """Passage tokens of all candidates."""
        return sum(self.tokens[i] for ids in self.candidates.values() for i in ids)


def evaluate(request: Request, execute: Executor) -> Evaluation:
    """Encode what is not encoded, rank, judge.

    Args:
        request: what to evaluate.
        execute: encodes passages; see `pipeline.run.driver`.

    Returns:
        The evaluation; run files of all settings are in `folder`/runs.

    Raises:
        InputError: bad input, or candidates of which none is stored.
        KalmError: as `pipeline.run.driver.run`.
    """
    tables = _tables(request, execute)
    table = tables[request.store_dtypes[0]]
    first, name, label = _first_stage(request, table)
    known = _lengths(table, first)
    first, gaps = _stored(first, known)
    gaps += _unreachable(request.collection, table)
    if not any(first.values()):
        raise InputError(
            f"{label} found no stored passage for any query. Full-text search splits at spaces: "
            "where the language has none, give the candidates of another first stage with --run"
        )
    candidates = {q: list(scores) for q, scores in first.items()}
    rankings = [Ranking(name, "first stage", {q: list(s.items()) for q, s in first.items()})]
    decoder = QueryDecoder.load(request.model, revision=request.revision)
    costs = _Costs(known, candidates)
    for dtype in request.store_dtypes:
        reranker = Reranker(tables[dtype], decoder, max_length=request.max_length)
        suffix = "" if dtype == request.store_dtypes[0] else f"-{dtype}"
        for stages in [((ratio, None),) for ratio in request.ratios] + list(request.cascades):
            ranking = _rank(request, reranker, stages, costs, suffix)
            rankings.append(ranking)
            if request.fuse and not suffix and len(stages) == 1:
                rankings.append(_fused(ranking, first, name))
    values = _judge(request, rankings)
    return evaluation_of(
        request.collection,
        table,
        rankings,
        values,
        first_stage=label,
        instruction=request.instruction or DEFAULT_INSTRUCTION,
        note=request.note,
        warnings=[*request.collection.warnings, *gaps],
    )


def _tables(request: Request, execute: Executor) -> dict[str, PassageTable]:
    """Return a table a dtype, up to date with the corpus."""
    files = checkpoint.resolve(request.model, request.revision)
    asked = {ratio for stages in request.cascades for ratio, _ in stages} | set(request.ratios)
    ratios = tuple(sorted(asked))
    first, *others = request.store_dtypes
    name = re.sub(r"[^a-zA-Z0-9_-]", "-", request.collection.name)
    files_read = "\n".join(map(absolute, request.collection.corpus))
    place = xxhash.xxh3_64_hexdigest(files_read.encode())
    model = f"{files.fingerprint[:8]}-r{'-'.join(map(str, ratios))}-l{request.max_length}"
    shape = f"{name}-{place[:6]}-{model}"  # another collection has tables of its own
    base = request.folder / "states" / f"{shape}-{first}.lance"
    job = EncodeJob(
        inputs=request.collection.corpus, uri=str(base), model=request.model,
        revision=request.revision, ratios=ratios, store_dtype=first,
        max_length=request.max_length,
    )  # fmt: skip
    try:
        PassageTable.open(job.uri)
    except TableError:
        run(job, execute)
    else:
        sync(job, execute, delete_missing=True)
    tables = {first: PassageTable.open(job.uri)}
    for dtype in others:
        uri = base.with_name(f"{shape}-{dtype}-of-{tables[first].version}.lance")
        for stale in base.parent.glob(f"{shape}-{dtype}-of-*.lance"):
            if stale != uri:
                shutil.rmtree(stale)
        truncate(job.uri, str(uri), store_dtype=dtype)
        tables[dtype] = PassageTable.open(str(uri))
    return tables


def _first_stage(request: Request, table: PassageTable) -> tuple[Run, str, str]:
    """Return candidates with scores, best first; the setting's name; and what made them."""
    if request.first_run is not None:
        run_file, tag = read_run(request.first_run)
        tag = f"first-{tag}" if re.match(r"r\d", tag) else tag  # a setting of ours has that name
        queries = request.collection.queries
        cut = {q: dict(list(run_file.get(q, {}).items())[: request.depth]) for q in queries}
        return cut, tag, f"{tag} ({request.first_run.name}), top {request.depth}"
    found = {
        q: dict(table.search(text, request.depth)) for q, text in request.collection.queries.items()
    }
    return found, "bm25", f"BM25 (Lance full-text search), top {request.depth}"


def _stored(first: Run, known: Mapping[str, int]) -> tuple[Run, list[str]]:
    """Return the candidates that are stored, and what there is to tell of the others."""
    gaps = []
    if missing := {i for scores in first.values() for i in scores if i not in known}:
        shown = ", ".join(sorted(missing)[:5])
        gaps.append(f"{len(missing)} candidates are not in the corpus and were left out: {shown}")
    kept = {q: {i: s for i, s in scores.items() if i in known} for q, scores in first.items()}
    if empty := sum(not scores for scores in kept.values()):
        gaps.append(f"{empty} queries have no candidates and count as 0")
    return kept, gaps


def _unreachable(collection: Collection, table: PassageTable) -> list[str]:
    """Tell of relevant passages that the corpus does not hold: no ranking can find them."""
    relevant = sorted(
        {i for judged in collection.judgements.values() for i, r in judged.items() if r > 0}
    )
    held: set[str] = set()
    for start in range(0, len(relevant), IDS_AT_ONCE):
        held |= table.known(relevant[start : start + IDS_AT_ONCE])
    if not (gone := [i for i in relevant if i not in held]):
        return []
    shown = ", ".join(gone[:5])
    return [f"{len(gone)} of {len(relevant)} relevant passages are not in the corpus: {shown}"]


def _judge(request: Request, rankings: Sequence[Ranking]) -> dict[str, dict[str, dict[str, float]]]:
    """Write a run file a ranking and return its metrics, by setting, query and name."""
    folder = request.folder / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    values = {}
    for ranking in rankings:
        file = folder / f"{re.sub(r'[^a-zA-Z0-9._+,-]', '-', ranking.name)}.trec"
        write_run(file, ranking.ranked, ranking.name)
        values[ranking.name] = metrics.per_query(
            request.collection.judgements, file, request.measures
        )
    return values


def _lengths(table: PassageTable, first: Run) -> dict[str, int]:
    """Return the tokens of each candidate that is stored."""
    ids = list(dict.fromkeys(i for scores in first.values() for i in scores))
    found: dict[str, int] = {}
    for start in range(0, len(ids), IDS_AT_ONCE):
        lengths = table.lengths(ids[start : start + IDS_AT_ONCE])
        found.update((i, num_tokens) for i, (num_tokens, _) in lengths.items())
    return found


def _rank(
    request: Request, reranker: Reranker, stages: Stages, costs: _Costs, suffix: str
) -> Ranking:
    """Rerank all queries' candidates with one setting."""
    began = time.perf_counter()
    results: dict[str, list[RerankResult]] = {}
    took = []
    for query, text in request.collection.queries.items():
        start = time.perf_counter()
        results[query] = reranker.rerank(
            text, costs.candidates[query], instruction=request.instruction, cascade=stages
        )
        took.append(1000 * (time.perf_counter() - start))
    name = stages_name(stages) + suffix
    logger.info("%s: %d queries in %.0f s", name, len(results), time.perf_counter() - began)
    read = costs.read(reranker.table, results, stages)
    return Ranking(
        name,
        "reranked" if len(stages) == 1 else "cascade",
        {q: [(r.id, r.score) for r in found] for q, found in results.items()},
        margins={q: {r.id: r.margin for r in found} for q, found in results.items()},
        ratio=stages[-1][0],
        store_dtype=reranker.table.spec.store_dtype,
        bytes_per_passage=read / max(1, costs.num_candidates),
        bytes_per_token=read / max(1, costs.num_tokens),
        ms_per_query=took,
    )


def _fused(ranking: Ranking, first: Run, name: str) -> Ranking:
    """Return a reranking added to the first stage; it costs what the reranking costs."""
    fused = {}
    for query, scores in first.items():
        total = fuse(scores, ranking.margins[query])
        fused[query] = sorted(total.items(), key=lambda pair: (-pair[1], pair[0]))
    return Ranking(
        f"{ranking.name}+{name}", "fused", fused, ratio=ranking.ratio,
        store_dtype=ranking.store_dtype, bytes_per_passage=ranking.bytes_per_passage,
        bytes_per_token=ranking.bytes_per_token, ms_per_query=ranking.ms_per_query,
    )  # fmt: skip


def stages_name(stages: Stages) -> str:
    """Return `r4` for one stage, `r32:20,4` for a cascade."""
    return "r" + ",".join(f"{ratio}:{keep}" if keep else str(ratio) for ratio, keep in stages)
