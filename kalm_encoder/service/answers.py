"""What each request is answered with."""

from __future__ import annotations

import time
import uuid
from typing import Any

from kalm_encoder import PassageTable, __version__
from kalm_encoder.service.engine import Engine, Scored
from kalm_encoder.service.shapes import Document, Options, RerankRequest, ScoreRequest, TeiRequest


def rerank(engine: Engine, request: RerankRequest) -> dict[str, Any]:
    """Answer in the union of the shapes of Cohere, Jina and vLLM."""
    candidates = request.candidates()
    with engine.live.lease() as version:
        scored, tokens = engine.rerank(version, request.query, candidates, request)
        scored = scored[: request.top_n or None]
        texts = _texts(version.table, candidates, scored) if request.return_documents else {}
    results = []
    for one in scored:
        result: dict[str, Any] = {"index": one.index, "relevance_score": one.score}
        if one.id is not None:
            result["id"] = one.id
        if request.raw_scores:
            result["margin"] = one.margin
        if one.index in texts:
            result["document"] = {"text": texts[one.index]}
        results.append(result | {"ratio": one.ratio})
    meta: dict[str, Any] = {
        "api_version": {"version": "2"},
        "billed_units": {"search_units": 1},
    }
    if request.max_tokens_per_doc is not None or request.truncate_prompt_tokens is not None:
        meta["warnings"] = [
            f"passages are cut to {version.table.spec.max_length} tokens when they are encoded: "
            "max_tokens_per_doc and truncate_prompt_tokens are ignored"
        ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "object": "list",
        "model": request.model or version.model_name,
        "results": results,
        "usage": usage,
        "meta": meta,
    }


def _texts(table: PassageTable, candidates: list[Document], scored: list[Scored]) -> dict[int, str]:
    """Return the texts of candidates by place: as sent, else as stored."""
    stored = table.texts([s.id for s in scored if s.id and candidates[s.index].text is None])
    found = {}
    for one in scored:
        text = candidates[one.index].text
        if text is None and one.id is not None:
            text = stored.get(one.id)
        if text is not None:
            found[one.index] = text
    return found


def tei(engine: Engine, request: TeiRequest) -> list[dict[str, Any]]:
    """Answer in TEI's shape."""
    candidates = [Document(text=text) for text in request.texts]
    with engine.live.lease() as version:
        scored, _ = engine.rerank(version, request.query, candidates, Options())
    results: list[dict[str, Any]] = []
    for one in scored:
        score = one.margin if request.raw_scores else one.score
        results.append({"index": one.index, "score": score})
        if request.return_text:
            results[-1]["text"] = request.texts[one.index]
    return results


def score(engine: Engine, request: ScoreRequest) -> dict[str, Any]:
    """Answer in vLLM's shape; what a filter drops is missing from `data`."""
    by_query: dict[str, list[tuple[int, Document]]] = {}
    for place, (query, candidate) in enumerate(request.pairs()):
        by_query.setdefault(query, []).append((place, candidate))
    engine.check_count(sum(map(len, by_query.values())))
    scores: dict[int, float] = {}
    tokens = 0
    with engine.live.lease() as version:
        for query, members in by_query.items():
            scored, used = engine.rerank(version, query, [c for _, c in members], request)
            tokens += used
            scores |= {members[one.index][0]: one.score for one in scored}
    return {
        "id": f"score-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": request.model or version.model_name,
        "data": [
            {"index": place, "object": "score", "score": scores[place]} for place in sorted(scores)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def info(engine: Engine, max_body: int) -> dict[str, Any]:
    """Say what is served; no paths."""
    with engine.live.lease() as version:
        spec, rows = version.table.spec, len(version.table)
    return {
        "model": version.model_name,
        "revision": spec.revision,
        "fingerprint": spec.fingerprint,
        "table_version": version.table.version,
        "rows": rows,
        "ratios": list(spec.ratios),
        "store_dtype": spec.store_dtype,
        "max_length": spec.max_length,
        "with_encoder": engine.settings.with_encoder,
        "filter_columns": sorted(engine.settings.filter_columns),
        "max_candidates": engine.settings.max_candidates,
        "max_body": max_body,
        "version": __version__,
    }
