"""The answer to a request that fails: a status and a message, and never a traceback or a path."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from kalm_encoder.errors import InputError, MissingIdsError

logger = logging.getLogger(__name__)

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {} for status in (400, 401, 403, 408, 413, 415, 421, 422, 429, 503, 504)
}
"""The errors that the OpenAPI schema lists; the message of an answer says what went wrong."""
HANDLED = (RequestValidationError, InputError, HTTPException)
"""The exceptions that `answer_problem` is registered for; traces.py calls it for all others."""


async def answer_problem(request: Request, error: Exception) -> Response:
    """Turn what went wrong into the union of the error shapes that clients know."""
    status, headers, more = 422, None, {}
    match error:
        case RequestValidationError():
            message = "; ".join(_invalid_field(e) for e in error.errors()[:5])
        case MissingIdsError():
            remedy = error.remedy[0].upper() + error.remedy[1:]
            message = f"{len(error.ids)} ids have no stored states: {error.shown}. {remedy}"
            more = {"missing_ids": error.ids}
        case InputError():
            message = str(error)
        case HTTPException():
            status, message, headers = error.status_code, str(error.detail), error.headers
            if status == 405:
                headers = {"Allow": _allowed(headers)}
                if request.method == "OPTIONS":
                    return Response(status_code=204, headers=headers)
        case _:
            logger.error("a request failed", exc_info=error)
            status, message = 500, "the request failed; the log of the server says why"
    kind = {413: "Overloaded", 422: "Validation", 429: "Overloaded"}.get(status, "Backend")
    body = {"message": message, "detail": message, "error": message, "error_type": kind}
    return JSONResponse(body | more, status, headers)


def _allowed(headers: Mapping[str, str] | None) -> str:
    """Return the methods of a path: those of its route, and those that every path has.

    Starlette names none for a path of static files, which it serves by GET.
    """
    methods = (headers or {}).get("Allow", "GET")
    return f"{methods.replace('GET', 'GET, HEAD')}, OPTIONS"


def _invalid_field(error: Any) -> str:
    """Say what is wrong with one field, without repeating what the request held there."""
    return f"{'.'.join(str(part) for part in error['loc'])[:200]}: {error['msg'][:200]}"
