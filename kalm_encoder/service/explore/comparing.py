"""What the explore page asks: one query, its first stage and its reranking, and what they cost.

Several tables of one model share the decoder of the live one. They are read as they were when the
command began: what the page compares does not change under it. Knows no HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kalm_encoder import PassageTable, Reranker, RerankResult
from kalm_encoder.errors import InputError, MissingIdsError
from kalm_encoder.matryoshka import num_groups
from kalm_encoder.prompts import DEFAULT_INSTRUCTION
from kalm_encoder.rerank.fusion import fuse
from kalm_encoder.service.engine import Engine
from kalm_encoder.service.explore.tables import cascades, ratio_steps
from kalm_encoder.service.shapes import ExploreRequest, PassageRequest

if TYPE_CHECKING:
    import torch

    from kalm_encoder.model.decoder import Pair, Prompt
    from kalm_encoder.rerank.reranker import Scorer

SHOWN_CHARACTERS = 600
"""Of a text in a list; the whole one is asked for by id."""


class Stopwatch:
    """A decoder that adds up the seconds its callers wait for scores."""

    def __init__(self, decoder: Scorer) -> None:
        self.decoder = decoder
        self.fingerprint = decoder.fingerprint
        self.dim = decoder.dim
        self.seconds = 0.0

    def prompt(self, query: str, instruction: str | None = None) -> Prompt:
        """See QueryDecoder."""
        return self.decoder.prompt(query, instruction)

    def recall(self, prompt: Prompt, key: Hashable) -> torch.Tensor | None:
        """See QueryDecoder."""
        return self.decoder.recall(prompt, key)

    def score_pairs(self, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
        """See QueryDecoder."""
        began = time.perf_counter()
        scores = self.decoder.score_pairs(pairs)
        self.seconds += time.perf_counter() - began
        return scores


class Explorer:
    """Answers the page.

    Args:
        engine: holds the decoder; its live table is one of `tables`.
        tables: by the name that the page shows, see `open_tables`.
        note: what a reader of the page must know, such as that the weights are random.
    """

    def __init__(
        self, engine: Engine, tables: Mapping[str, PassageTable], note: str | None = None
    ) -> None:
        self.engine = engine
        self.tables = tables
        self.note = note

    def about(self) -> dict[str, Any]:
        """Say what there is to choose from; no paths."""
        return {
            "model": self.engine.model_name,
            "note": self.note,
            "instruction": DEFAULT_INSTRUCTION,
            "max_k": self.engine.settings.max_candidates,
            "tables": [
                {
                    "name": name,
                    "store_dtype": table.spec.store_dtype,
                    "rows": len(table),
                    "version": table.version,
                    "stored": list(table.spec.ratios),
                    "ratios": ratio_steps(table.spec.ratios),
                    "cascades": cascades(table.spec.ratios),
                }
                for name, table in self.tables.items()
            ],
        }

    def passage(self, request: PassageRequest) -> dict[str, Any]:
        """Return one whole text.

        Raises:
            MissingIdsError: no such passage.
        """
        table = self._table(request.table)
        texts = table.texts([request.id])
        if request.id not in texts:
            raise MissingIdsError([request.id], table.uri)
        return {"id": request.id, "text": texts[request.id]}

    def search(self, request: ExploreRequest) -> dict[str, Any]:
        """Search the text, rerank what is found, fuse both.

        Raises:
            InputError: an unknown table, too many candidates, an impossible ratio or cascade, or
                a live version of another model than the tables here.
        """
        table = self._table(request.table)
        self.engine.check_count(request.k)
        began = time.perf_counter()
        first = dict(table.search(request.query, request.k))
        found = time.perf_counter()
        with self.engine.live.lease() as version:
            if version.decoder.fingerprint != table.spec.fingerprint:
                raise InputError(
                    "the live version has another model than the tables shown here: start "
                    "`kalm explore` again"
                )
            watch = Stopwatch(version.decoder)
            results = Reranker(table, watch).rerank(
                request.query,
                list(first),
                instruction=request.instruction,
                ratio=request.ratio,
                cascade=request.cascade,
            )
        reranked = time.perf_counter() - found
        ms = {"search": found - began, "read": reranked - watch.seconds, "decode": watch.seconds}
        stages = [r for r, _ in request.cascade or [(request.ratio or table.spec.ratios[0], None)]]
        return {
            "table": request.table or next(iter(self.tables)),
            "first": [{"id": i, "score": score} for i, score in first.items()],
            **_rankings(first, results, stages[-1]),
            "ms": {step: 1000 * seconds for step, seconds in ms.items()},
            **_passages(table, results, stages),
        }

    def _table(self, name: str | None) -> PassageTable:
        if name is None:
            return next(iter(self.tables.values()))
        if name not in self.tables:
            raise InputError(f"no table {name!r} here: give one of {', '.join(self.tables)}")
        return self.tables[name]


def _rankings(
    first: Mapping[str, float], results: Sequence[RerankResult], finest: int
) -> dict[str, Any]:
    """Return both rankings with the places each candidate climbed since the first stage.

    Fused are margins of the last stage alone: those of different ratios do not compare.
    """
    place = {i: n for n, i in enumerate(first)}
    fused = fuse(first, {r.id: r.margin for r in results if r.ratio == finest})
    return {
        "reranked": [
            {
                "id": r.id,
                "score": r.score,
                "margin": r.margin,
                "ratio": r.ratio,
                "movement": place[r.id] - n,
            }
            for n, r in enumerate(results)
        ],
        "fused": [
            {"id": i, "score": fused[i], "movement": place[i] - n}
            for n, i in enumerate(sorted(fused, key=lambda i: (-fused[i], i)))
        ],
    }


def _passages(
    table: PassageTable, results: Sequence[RerankResult], stages: Sequence[int]
) -> dict[str, Any]:
    """Return what is known of the candidates, and the state bytes their scores took.

    A candidate was scored at every stage down to the one that its result names.
    """
    ids = [r.id for r in results]
    lengths, texts = table.lengths(ids), table.texts(ids)
    read = finest = states = 0
    for result in results:
        tokens, _ = lengths[result.id]
        finest += table.spec.read_bytes(tokens, None)
        for ratio in stages:
            if ratio >= result.ratio:
                read += table.spec.read_bytes(tokens, ratio)
                states += num_groups(tokens, ratio)
    passages = {
        i: {
            "text": texts[i][:SHOWN_CHARACTERS],
            "whole": len(texts[i]) <= SHOWN_CHARACTERS,
            "num_tokens": lengths[i][0],
            "truncated": lengths[i][1],
        }
        for i in ids
    }
    return {
        "bytes": {"read": read, "finest": finest},
        "states": states,
        "passages": passages,
    }
