"""The service as an application: its routes, its key, and how it starts and stops."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from kalm_encoder import tracing
from kalm_encoder.errors import InputError, KalmError
from kalm_encoder.service import answers, metrics, traces
from kalm_encoder.service.access import key_check, only_loopback
from kalm_encoder.service.explore.comparing import Explorer
from kalm_encoder.service.explore.routes import Page, add_routes
from kalm_encoder.service.http11 import Http11
from kalm_encoder.service.limits import (
    LOADING,
    RETRY_LOADING_S,
    RequestThreads,
    limit_body,
    limit_time,
)
from kalm_encoder.service.live import LiveTable
from kalm_encoder.service.problems import ERRORS, HANDLED, answer_problem
from kalm_encoder.service.requests import RerankRequest, ScoreRequest, TeiRequest
from kalm_encoder.service.settings import Settings
from kalm_encoder.version import __version__

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""Seconds that an idle connection stays open. It is above the 60 s after which load balancers close
theirs: one that sent a request into a connection that we are closing would answer 502."""


def create_app(
    settings: Settings, explorer: Explorer | None = None, *, names_request: bool = True
) -> FastAPI:
    """Return the application, which loads its model when it is started.

    Args:
        settings: What the operator decided.
        explorer: What answers the explore page at /. None leaves the page out.
        names_request: Whether answers get an X-Request-ID; the proxy of Ray Serve adds one itself.

    Raises:
        InputError: There is a page, which shows all rows, and keys that see only some.
    """
    if explorer is not None and settings.predicates:
        raise InputError("the explore page shows all rows: serve keys with predicates without it")
    live = LiveTable(settings, metrics.BATCH_PAIRS.observe, metrics.BATCH_TEXTS.observe)
    threads = RequestThreads(live)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tracing.start("kalm-serve")  # in a replica on Ray; elsewhere the command has done so
        loading = asyncio.create_task(asyncio.to_thread(_load, live))
        yield
        await loading
        await asyncio.to_thread(live.close)
        await asyncio.to_thread(tracing.stop)

    app = FastAPI(
        title="kalm serve", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.live = live
    app.add_middleware(limit_body, max_body=settings.max_body)
    app.add_middleware(limit_time, timeout_s=settings.timeout_s)
    if settings.only_loopback:
        app.add_middleware(only_loopback)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", *traces.HEADERS_IN],
            expose_headers=["Retry-After", "WWW-Authenticate", *traces.HEADERS],
        )
    app.add_middleware(metrics.count)
    app.add_middleware(traces.trace, names_request=names_request)
    app.add_middleware(_head_as_get)
    for kind in HANDLED:
        app.add_exception_handler(kind, answer_problem)
    asked_by = Depends(key_check(settings.keys))  # gives the predicate of the key
    guarded = APIRouter(dependencies=[asked_by], responses=ERRORS)

    @app.get("/health", responses={503: ERRORS[503]})
    async def health() -> dict[str, str]:
        """Answer 200 once a table is loaded and warm."""
        if live.current is None:
            raise HTTPException(503, LOADING, {"Retry-After": RETRY_LOADING_S})
        return {"status": "ok"}

    @guarded.get("/metrics", response_class=Response)
    async def prometheus(where: str | None = asked_by) -> Response:
        """Return the metrics in the text format of Prometheus."""
        if where is not None:
            raise HTTPException(403, "the metrics tell of all rows, and this key sees only some")
        return metrics.page(live, len(threads.pending))

    @guarded.get("/info")
    async def info(where: str | None = asked_by) -> dict[str, Any]:
        """Say what is served."""
        return await threads.run(where, answers.info)

    async def rerank(request: RerankRequest, where: str | None = asked_by) -> dict[str, Any]:
        """Rank stored passages or texts for a query, best first."""
        return await threads.run(where, answers.rerank, request)

    async def tei(request: TeiRequest, where: str | None = asked_by) -> list[dict[str, Any]]:
        """Rank texts for a query, best first, in the shape of Text Embeddings Inference."""
        return await threads.run(where, answers.tei, request)

    async def score(request: ScoreRequest, where: str | None = asked_by) -> dict[str, Any]:
        """Score pairs, in the order of the request."""
        return await threads.run(where, answers.score, request)

    guarded.post("/rerank")(tei if settings.tei else rerank)
    for path in ("/v1/rerank", "/v2/rerank"):
        guarded.post(path)(rerank)
    for path in ("/score", "/v1/score"):
        guarded.post(path)(score)
    if explorer is not None:
        add_routes(guarded, explorer, threads)
    app.include_router(guarded)
    if explorer is not None:
        app.mount("/", Page())
    return app


def _head_as_get(app: ASGIApp) -> ASGIApp:
    """Return the application, which answers HEAD as GET; the server leaves the body out."""

    async def answered(scope: Scope, receive: Receive, send: Send) -> None:
        as_get = {"method": "GET"} if scope.get("method") == "HEAD" else {}
        await app({**scope, **as_get}, receive, send)

    return answered


def _load(live: LiveTable) -> None:
    """Load, or end the process: a server that can serve nothing must not look alive."""
    try:
        live.load()
    except KalmError as error:
        logger.error("%s", error)
        os._exit(error.exit_code)
    except BaseException:
        logger.exception("the model could not be loaded")
        os._exit(1)


def listen(app: FastAPI, host: str, port: int, *, keep_alive_s: int = KEEP_ALIVE_S) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that were accepted are answered first."""
    # uvicorn handles both signals itself, and raises them again when all is answered.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    logger.info("listening at http://%s:%d", host, port)
    uvicorn.run(
        app,
        host=host,
        port=port,
        http=Http11,
        ws="none",
        timeout_keep_alive=keep_alive_s,
        log_level="warning",
        access_log=False,
    )
