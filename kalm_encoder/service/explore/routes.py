"""The explore page over HTTP: its routes, and its files as they lie in page/."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from kalm_encoder.service.explore.comparing import Explorer
from kalm_encoder.service.shapes import ExploreRequest, PassageRequest

Run = Callable[[Callable[[], dict[str, Any]]], Awaitable[dict[str, Any]]]
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; form-action 'none'; frame-ancestors 'none'; "
    "base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Everything the page needs comes from here, and it may run nothing else."""


class Page(StaticFiles):
    """The page's files; no key is needed to load them, as they hold no data."""

    def __init__(self) -> None:
        super().__init__(directory=Path(__file__).parent / "page", html=True)

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Answer with a file and the headers that confine it."""
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def add_routes(router: APIRouter, explorer: Explorer, run: Run) -> None:
    """Add what the page asks.

    Args:
        router: of the routes that need the key.
        explorer: what answers.
        run: runs blocking work within the service's limits.
    """

    @router.get("/explore/about")
    async def about() -> dict[str, Any]:
        """What there is to choose from."""
        return await run(explorer.about)

    @router.post("/explore/search")
    async def search(request: ExploreRequest) -> dict[str, Any]:
        """First stage, reranked and fused lists of one query, and what they cost."""
        return await run(lambda: explorer.search(request))

    @router.post("/explore/passage")
    async def passage(request: PassageRequest) -> dict[str, Any]:
        """The whole text of one passage."""
        return await run(lambda: explorer.passage(request))
