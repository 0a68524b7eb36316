"""What one process takes on: how long a body may be, and how many requests may wait how long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, TypeVar

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kalm_encoder.service.live import LiveTable, Version

P = ParamSpec("P")
T = TypeVar("T")


class BodyLimit:
    """Refuses a request body above a size before it is held in memory.

    Starlette's own limit answers with plain text where clients expect JSON. This one counts what
    arrives, as a Content-Length may be missing or wrong.
    """

    def __init__(self, app: ASGIApp, max_body: int) -> None:
        self.app = app
        self.max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; reading too much of its body raises HTTPException 413."""
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body:
                text = f"the request is longer than {self.max_body} bytes"
                raise HTTPException(413, text, {"Connection": "close"})
            return message

        await self.app(scope, counted, send)


class RequestThreads:
    """Runs the blocking work of requests in a bounded number of threads.

    Attributes:
        pending: Number of requests that are worked on or wait for a thread.
    """

    def __init__(self, live: LiveTable) -> None:
        self.live = live
        self.settings = live.settings
        self.pending = 0
        self._threads = ThreadPoolExecutor(live.settings.threads, "kalm-request")

    async def run(
        self, answer: Callable[Concatenate[Version, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call `answer` with the live version and the arguments, and wait for what it returns.

        The call holds its version, so a request ends on the version it began with.

        Raises:
            HTTPException: 503 if nothing is loaded yet, 429 if too many requests wait, 504 if the
                answer is not there in time.
        """
        if (version := self.live.current) is None:
            raise HTTPException(503, "the model is being loaded", {"Retry-After": "5"})
        if self.pending >= self.settings.max_pending:
            raise HTTPException(429, "too many requests are waiting", {"Retry-After": "1"})
        timeout_s = self.settings.timeout_s
        late = HTTPException(504, f"the answer was not ready within {timeout_s:g} s")
        deadline = time.monotonic() + timeout_s

        def work() -> T:
            if time.monotonic() > deadline:  # nobody waits for this answer any more
                raise late
            return answer(version, *args, **kwargs)

        self.pending += 1
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        future.add_done_callback(self._finished)
        await asyncio.wait([future], timeout=timeout_s)
        if not future.done():
            raise late
        return future.result()

    def _finished(self, future: asyncio.Future[Any]) -> None:
        self.pending -= 1
        if not future.cancelled():
            future.exception()  # asyncio reports an exception that nobody looked at
