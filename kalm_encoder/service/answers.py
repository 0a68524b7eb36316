"""Answers each request with plain dictionaries in the shapes that clients know."""

from __future__ import annotations

import math
import time
import uuid
from typing import Any

from kalm_encoder import __version__
from kalm_encoder.rerank.results import DocumentResult, passage_of
from kalm_encoder.rerank.texts import TEXT
from kalm_encoder.service.live import Version
from kalm_encoder.service.requests import Document, Options, RerankRequest, ScoreRequest, TeiRequest
from kalm_encoder.service.scoring import check_count, score_candidates


def rerank(version: Version, request: RerankRequest) -> dict[str, Any]:
    """Answer in the union of the shapes of Cohere, Jina and vLLM."""
    candidates = request.candidates()
    scored, tokens = score_candidates(version, request.query, candidates, request)
    scored = scored[: request.top_n or None]
    stored, metadata = {}, {}
    found = (passage_of(one) for _, one in scored if one.ratio is not None)
    ids = [id for id in found if not id.startswith(TEXT)]
    if request.return_documents:
        stored = version.table.texts(ids)
    if request.return_metadata:
        metadata = version.table.metadata(ids)
    results = []
    for index, one in scored:
        candidate = candidates[index]
        # What was scored is what is returned: a stored passage, or the text of the request.
        id = passage_of(one)
        text = candidate.text if id.startswith(TEXT) else stored.get(id)
        result: dict[str, Any] = {"index": index, "relevance_score": one.score}
        if isinstance(one, DocumentResult):
            result |= {"id": one.id, "passage_id": one.passage_id, "span": one.span}
        elif candidate.id is not None:
            result["id"] = candidate.id
        if request.raw_scores:
            result["margin"] = None if one.ratio is None else one.margin
        if request.return_documents and text is not None:
            result["document"] = {"text": text}
        if id in metadata:
            result["metadata"] = {n: _as_json(value) for n, value in metadata[id].items()}
        is_stored = one.ratio is not None and not id.startswith(TEXT)
        results.append(result | {"ratio": one.ratio, "stored": is_stored})
    meta: dict[str, Any] = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
    if request.max_tokens_per_doc is not None or request.truncate_prompt_tokens is not None:
        meta["warnings"] = [
            f"passages are cut to {version.table.spec.max_length} tokens when they are encoded: "
            "max_tokens_per_doc and truncate_prompt_tokens are ignored"
        ]
    head = _head("rerank", request.model or version.model_name, tokens)
    return head | {"results": results, "meta": meta}


def tei(version: Version, request: TeiRequest) -> list[dict[str, Any]]:
    """Answer in the shape of Text Embeddings Inference."""
    candidates = [Document(text=text) for text in request.texts]
    scored, _ = score_candidates(version, request.query, candidates, Options())
    return [
        {"index": index, "score": one.margin if request.raw_scores else one.score}
        | ({"text": request.texts[index]} if request.return_text else {})
        for index, one in scored
    ]


def score(version: Version, request: ScoreRequest) -> dict[str, Any]:
    """Answer in the shape of vLLM; what a filter drops is missing from `data`."""
    pairs = request.pairs()
    check_count(version, len(pairs))
    by_query: dict[str, list[int]] = {}
    for place, (query, _) in enumerate(pairs):
        by_query.setdefault(query, []).append(place)
    scores: dict[int, float] = {}
    tokens = 0
    for query, places in by_query.items():
        candidates = [pairs[place][1] for place in places]
        scored, used = score_candidates(version, query, candidates, request)
        tokens += used
        scores |= {places[index]: one.score for index, one in scored}
    data = [{"index": n, "object": "score", "score": s} for n, s in sorted(scores.items())]
    head = _head("score", request.model or version.model_name, tokens)
    return head | {"created": int(time.time()), "data": data}


def info(version: Version) -> dict[str, Any]:
    """Say what is served, without any path."""
    spec, settings = version.table.spec, version.settings
    return {
        "model": version.model_name,
        "revision": spec.revision,
        "fingerprint": spec.fingerprint,
        "table_version": version.table.version,
        "rows": len(version.table),
        "ratios": list(spec.ratios),
        "store_dtype": spec.store_dtype,
        "max_length": spec.max_length,
        "with_encoder": settings.with_encoder,
        "match_text": settings.match_text,
        "metadata_columns": dict(spec.metadata_columns),
        "filter_columns": sorted(settings.filter_columns),
        "max_candidates": settings.max_candidates,
        "max_body": settings.max_body,
        "version": __version__,
    }


def _as_json(value: Any) -> Any:
    """Return a value of a metadata column; JSON has neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _head(kind: str, model: str, tokens: int) -> dict[str, Any]:
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": "list",
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
