"""Limits how long a body may be, and how many requests may wait for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, TypeVar

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kalm_encoder.service.live import LiveTable, Version

P = ParamSpec("P")
T = TypeVar("T")


def limit_body(app: ASGIApp, max_body: int) -> ASGIApp:
    """Return the application with a limit: reading more bytes of a body raises HTTPException 413.

    Starlette's own limit answers with plain text where clients expect JSON. This one counts what
    arrives, as a Content-Length may be missing or wrong.
    """

    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > max_body:
                text = f"the request is longer than {max_body} bytes"
                raise HTTPException(413, text, {"Connection": "close"})
            return message

        await app(scope, counted, send)

    return limited


class RequestThreads:
    """Runs the blocking work of requests in a bounded number of threads.

    Attributes:
        pending: The requests that are worked on or wait for a thread.
    """

    def __init__(self, live: LiveTable) -> None:
        self.live = live
        self.pending: set[Future[Any]] = set()
        self._threads = ThreadPoolExecutor(live.settings.threads, "kalm-request")

    async def run(
        self, answer: Callable[Concatenate[Version, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call `answer` with the live version and the arguments, and wait for what it returns.

        The call holds its version, so a request ends on the version it began with. A call that is
        late is not begun any more; one that runs counts as pending until it ends.

        Raises:
            HTTPException: 503 if nothing is loaded yet, 429 if too many requests wait, 504 if the
                answer is not there in time.
        """
        settings = self.live.settings
        if (version := self.live.current) is None:
            raise HTTPException(503, "the model is being loaded", {"Retry-After": "5"})
        if len(self.pending) >= settings.max_pending:
            raise HTTPException(429, "too many requests are waiting", {"Retry-After": "1"})
        future = self._threads.submit(answer, version, *args, **kwargs)
        self.pending.add(future)
        future.add_done_callback(self.pending.discard)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), settings.timeout_s)
        except TimeoutError:
            text = f"the answer was not ready within {settings.timeout_s:g} s"
            raise HTTPException(504, text) from None
