"""The answer to a request that fails: a status and a message, and never a traceback or a path."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from kalm_encoder.errors import InputError, MissingIdsError

logger = logging.getLogger(__name__)

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {} for status in (400, 401, 413, 422, 429, 503, 504)
}
"""The errors that the OpenAPI schema lists; the message of an answer says what went wrong."""
HANDLED = (RequestValidationError, InputError, HTTPException, Exception)
"""The exceptions that `answer_problem` is registered for."""


async def answer_problem(_: Request, error: Exception) -> Response:
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
        case _:
            logger.error("a request failed", exc_info=error)
            status, message = 500, "the request failed; the log of the server says why"
    kind = {413: "Overloaded", 422: "Validation", 429: "Overloaded"}.get(status, "Backend")
    body = {"message": message, "detail": message, "error": message, "error_type": kind}
    return JSONResponse(body | more, status, headers)


def _invalid_field(error: Any) -> str:
    """Say what is wrong with one field, without repeating what the request held there."""
    return f"{'.'.join(str(part) for part in error['loc'])[:200]}: {error['msg'][:200]}"
