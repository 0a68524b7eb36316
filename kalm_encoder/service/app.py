"""The HTTP face of an Engine: routes and limits."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response

from kalm_encoder.errors import KalmError
from kalm_encoder.service import answers
from kalm_encoder.service.engine import Engine
from kalm_encoder.service.explore.comparing import Explorer
from kalm_encoder.service.explore.routes import Page, add_routes
from kalm_encoder.service.limits import BodyLimit
from kalm_encoder.service.metrics import Metrics
from kalm_encoder.service.problems import ERRORS, HANDLERS
from kalm_encoder.service.shapes import RerankRequest, ScoreRequest, TeiRequest
from kalm_encoder.version import __version__

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What one process takes on.

    Attributes:
        threads: requests worked on at once; the rest waits.
        max_pending: requests worked on or waiting; one more gets 429.
        timeout_s: a request that is not done by then gets 504.
        max_body: bytes of a request; a longer one gets 413.
        api_key: bearer key that all but /health asks for; None asks for none.
    """

    threads: int = 16
    max_pending: int = 128
    timeout_s: float = 60.0
    max_body: int = 8 << 20
    api_key: str | None = None


class Service:
    """Runs blocking work of requests in threads, a bounded number at a time."""

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics) -> None:
        self.engine = engine
        self.limits = limits
        self.metrics = metrics
        self.pending = 0
        self._threads = ThreadPoolExecutor(limits.threads, thread_name_prefix="kalm-request")

    async def run(self, work: Callable[[], T]) -> T:
        """Run work in a thread and wait for it.

        Raises:
            HTTPException: 503 not loaded yet, 429 too much is waiting, 504 it took too long.
        """
        if self.engine.live.current is None:
            raise HTTPException(503, "the model is being loaded", {"Retry-After": "5"})
        if self.pending >= self.limits.max_pending:
            raise HTTPException(429, "too many requests are waiting", {"Retry-After": "1"})
        deadline = time.monotonic() + self.limits.timeout_s
        self.pending += 1
        future = asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: work() if time.monotonic() < deadline else None
        )
        future.add_done_callback(self._finished)
        try:
            result = await asyncio.wait_for(asyncio.shield(future), self.limits.timeout_s)
        except TimeoutError:
            result = None
        if result is None:
            raise HTTPException(504, f"not done within {self.limits.timeout_s:g} s")
        return result

    def _finished(self, future: asyncio.Future[Any]) -> None:
        self.pending -= 1
        if not future.cancelled():
            future.exception()  # seen; a request that timed out no longer asks


def create_app(
    engine: Engine,
    limits: Limits,
    metrics: Metrics,
    *,
    tei: bool = False,
    explorer: Explorer | None = None,
) -> FastAPI:
    """Return the application; it loads the engine when it is started.

    Args:
        engine: not loaded yet.
        limits: the operator's.
        metrics: what /metrics shows.
        tei: give /rerank the shape of Text Embeddings Inference.
        explorer: answers the explore page at /; None leaves the page out.
    """
    service = Service(engine, limits, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        loading = loop.run_in_executor(None, _load, engine)
        yield
        await loading
        await loop.run_in_executor(None, engine.live.close)

    async def authorised(request: Request) -> None:
        if limits.api_key is None:
            return
        sent = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(sent.encode(), limits.api_key.encode()):
            raise HTTPException(401, "a valid bearer key is needed", {"WWW-Authenticate": "Bearer"})

    app = FastAPI(
        title="kalm serve", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.add_middleware(BodyLimit, limit=limits.max_body)
    app.add_middleware(metrics.Middleware, metrics=metrics)
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    guarded = APIRouter(dependencies=[Depends(authorised)], responses=ERRORS)

    @app.get("/health", responses={503: ERRORS[503]})
    async def health() -> dict[str, str]:
        """200 once a table is loaded and warm."""
        if engine.live.current is None:
            raise HTTPException(503, "the model is being loaded")
        return {"status": "ok"}

    @guarded.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Prometheus text format."""
        return Response(
            metrics.render(engine.live, service.pending), media_type=metrics.content_type
        )

    @guarded.get("/info")
    async def info() -> dict[str, Any]:
        """What is served."""
        return await service.run(lambda: answers.info(engine, limits.max_body))

    async def rerank(request: RerankRequest) -> dict[str, Any]:
        """Rank stored passages or texts for a query, best first."""
        return await service.run(lambda: answers.rerank(engine, request))

    async def tei_rerank(request: TeiRequest) -> list[dict[str, Any]]:
        """Rank texts for a query, best first, in the shape of Text Embeddings Inference."""
        return await service.run(lambda: answers.tei(engine, request))

    async def score(request: ScoreRequest) -> dict[str, Any]:
        """Score pairs, in the order given."""
        return await service.run(lambda: answers.score(engine, request))

    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        handler = tei_rerank if tei and path == "/rerank" else rerank
        guarded.post(path)(handler)
    for path in ("/score", "/v1/score"):
        guarded.post(path)(score)
    if explorer is not None:
        add_routes(guarded, explorer, service.run)
    app.include_router(guarded)
    if explorer is not None:
        app.mount("/", Page())
    return app


def _load(engine: Engine) -> None:
    """Load, or end the process: a server that can serve nothing must not look alive."""
    try:
        engine.live.load()
    except KalmError as error:
        logger.error("%s", error)
        os._exit(error.exit_code)
    except BaseException:
        logger.exception("loading failed")
        os._exit(1)


def listen(app: FastAPI, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that were accepted are answered first."""
    logger.info("listening at http://%s:%d", host, port)
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False)
