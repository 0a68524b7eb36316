"""The explore page over HTTP: what the page asks for, and its files as they lie in page/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from kalm_encoder.service.explore.comparing import Explorer
from kalm_encoder.service.limits import RequestThreads
from kalm_encoder.service.requests import ExploreRequest, PassageRequest

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; form-action 'none'; frame-ancestors 'none'; "
    "base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""The page loads everything from this service and runs nothing else."""


class Page(StaticFiles):
    """The files of the page. They need no key, as they hold no data."""

    def __init__(self) -> None:
        super().__init__(directory=Path(__file__).parent / "page", html=True)

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Answer with a file and the headers that confine it."""
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def add_routes(router: APIRouter, explorer: Explorer, threads: RequestThreads) -> None:
    """Add the routes that the page asks.

    Args:
        router: Router of the routes that need the key.
        explorer: What answers.
        threads: Runs the answers within the limits of the service.
    """

    @router.get("/explore/about")
    async def about() -> dict[str, Any]:
        """Say what there is to choose from."""
        return await threads.run(None, explorer.about)

    @router.post("/explore/search")
    async def search(request: ExploreRequest) -> dict[str, Any]:
        """Return the first stage, the reranked and the fused list of a query, and their cost."""
        return await threads.run(None, explorer.search, request)

    @router.post("/explore/passage")
    async def passage(request: PassageRequest) -> dict[str, Any]:
        """Return the whole text of one passage."""
        return await threads.run(None, explorer.passage, request)
