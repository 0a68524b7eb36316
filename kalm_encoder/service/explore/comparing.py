"""Computes what the explore page shows: the first stage and the reranking of a query, and costs.

Several tables of one model share the decoder of the live version. They are read as they were when
the command began, so what the page compares does not change meanwhile. It knows nothing of HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kalm_encoder import PassageTable, Reranker, RerankResult
from kalm_encoder.errors import InputError, MissingIdsError
from kalm_encoder.matryoshka import num_groups
from kalm_encoder.model.pairs import Pair
from kalm_encoder.prompts import DEFAULT_INSTRUCTION
from kalm_encoder.rerank.fusion import fuse
from kalm_encoder.service.explore.tables import cascades, ratio_steps
from kalm_encoder.service.live import Version
from kalm_encoder.service.requests import ExploreRequest, PassageRequest
from kalm_encoder.service.scoring import check_count

NUM_SHOWN_CHARACTERS = 600
"""Number of characters of each text in a list. The page asks for a whole text by its id."""


@dataclass(frozen=True)
class Explorer:
    """Answers what the page asks.

    Attributes:
        tables: The tables by the name that the page shows; see `open_tables`.
        note: What a reader of the page must know, such as that the weights are random.
    """

    tables: Mapping[str, PassageTable]
    note: str | None = None

    def about(self, version: Version) -> dict[str, Any]:
        """Say what there is to choose from, without any path."""
        return {
            "model": version.model_name,
            "note": self.note,
            "instruction": DEFAULT_INSTRUCTION,
            "max_k": version.settings.max_candidates,
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

    def passage(self, _: Version, request: PassageRequest) -> dict[str, Any]:
        """Return one whole text.

        Raises:
            MissingIdsError: There is no such passage.
        """
        table = self._table(request.table)
        texts = table.texts([request.id])
        if request.id not in texts:
            raise MissingIdsError([request.id], table.uri)
        return {"id": request.id, "text": texts[request.id]}

    def search(self, version: Version, request: ExploreRequest) -> dict[str, Any]:
        """Search the text, rerank what is found, and fuse both rankings.

        Raises:
            InputError: The table is unknown, there are too many candidates, the ratio or cascade is
                impossible, or the live version has another model than the tables.
        """
        table = self._table(request.table)
        check_count(version, request.k)
        if not version.decoder.files.made(table.spec.fingerprint, table.spec.files_hash):
            raise InputError(
                "the live version has another model than the tables shown here: start "
                "`kalm explore` again"
            )
        began = time.perf_counter()
        first = dict(table.search(request.query, request.k))
        found = time.perf_counter()
        waits = []

        def score_pairs(pairs: Sequence[Pair]) -> list[tuple[float, float]]:
            asked = time.perf_counter()
            scores = version.decoder.score_pairs(pairs)
            waits.append(time.perf_counter() - asked)
            return scores

        decoder = version.reranker.decoder
        results = Reranker(table, decoder, score_pairs=score_pairs).rerank(
            request.query,
            list(first),
            instruction=request.instruction,
            system_instruction=request.system_instruction,
            ratio=request.ratio,
            cascade=request.cascade,
        )
        reranked = time.perf_counter() - found
        stages = [r for r, _ in request.cascade or [(request.ratio or table.spec.ratios[0], None)]]
        return {
            "table": request.table or next(iter(self.tables)),
            "first": [{"id": i, "score": score} for i, score in first.items()],
            **_rankings(first, results, stages[-1]),
            "ms": {
                "search": 1000 * (found - began),
                "read": 1000 * (reranked - sum(waits)),
                "decode": 1000 * sum(waits),
            },
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
    """Return both rankings with the number of places each candidate climbed since the first stage.

    Only margins of the last stage are fused, because margins of different ratios do not compare.
    """
    place = {i: n for n, i in enumerate(first)}
    fused = fuse(first, {r.id: r.margin for r in results if r.ratio == finest})
    best = sorted(fused, key=fused.__getitem__, reverse=True)  # ties as in the first stage
    return {
        "reranked": [asdict(r) | {"movement": place[r.id] - n} for n, r in enumerate(results)],
        "fused": [
            {"id": i, "score": fused[i], "movement": place[i] - n} for n, i in enumerate(best)
        ],
    }


def _passages(
    table: PassageTable, results: Sequence[RerankResult], stages: Sequence[int]
) -> dict[str, Any]:
    """Return what is known of the candidates, and how many state bytes their scores took.

    A candidate was scored at every stage down to the one that its result names.
    """
    ids = [r.id for r in results]
    lengths, texts = table.lengths(ids), table.texts(ids)
    scored = [
        (lengths[r.id][0], ratio) for r in results for ratio in stages if ratio >= (r.ratio or 0)
    ]
    return {
        "bytes": {
            "read": sum(table.spec.read_bytes(tokens, ratio) for tokens, ratio in scored),
            "finest": sum(table.spec.read_bytes(tokens, None) for tokens, _ in lengths.values()),
        },
        "states": sum(num_groups(tokens, ratio) for tokens, ratio in scored),
        "passages": {
            i: {
                "text": texts[i][:NUM_SHOWN_CHARACTERS],
                "whole": len(texts[i]) <= NUM_SHOWN_CHARACTERS,
                "num_tokens": lengths[i][0],
                "truncated": lengths[i][1],
            }
            for i in ids
        },
    }
