"""Refuses request bodies above a size before they are held in memory."""

from __future__ import annotations

from fastapi.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kalm_encoder.service.problems import problem


class BodyLimit:
    """Counts what arrives: a Content-Length may be missing, or may lie."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, unless its body is too long."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        message = f"the request is longer than {self.limit} bytes"
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limit:
            reply = problem(413, message, {"Connection": "close"})
            await reply(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            part = await receive()
            received += len(part.get("body", b""))
            if received > self.limit:
                raise HTTPException(413, message)
            return part

        await self.app(scope, counted, send)
