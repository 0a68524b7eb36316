"""What a request that fails is answered with: no error tells more than a message."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from kalm_encoder.errors import InputError, MissingIdsError
from kalm_encoder.service.shapes import problems

logger = logging.getLogger(__name__)


def problem(status: int, message: str, headers: Any = None, **more: Any) -> JSONResponse:
    """Return an error in the union of the shapes clients know."""
    kind = {413: "Overloaded", 422: "Validation", 429: "Overloaded"}.get(status, "Backend")
    body = {"message": message, "detail": message, "error": message, "error_type": kind}
    return JSONResponse(body | more, status, headers)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return problem(422, problems(list(error.errors())))


async def _refused(_: Request, error: Exception) -> Response:
    return problem(422, str(error))


async def _missing(_: Request, error: Exception) -> Response:
    assert isinstance(error, MissingIdsError)
    message = f"{len(error.ids)} ids have no stored states: {error.shown}"
    return problem(422, message, missing_ids=error.ids)


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    return problem(error.status_code, str(error.detail), error.headers)


async def _broken(_: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error)
    return problem(500, "the request failed; the server's log says why")


HANDLERS: dict[Any, Any] = {
    RequestValidationError: _invalid,
    InputError: _refused,
    MissingIdsError: _missing,
    StarletteHTTPException: _http,
    Exception: _broken,
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "not JSON",
        401: "no valid key",
        413: "the request is too large",
        422: "the request cannot be answered; the message says why",
        429: "too many requests are waiting; see Retry-After",
        503: "not loaded yet",
        504: "not done in time",
    }.items()
}
