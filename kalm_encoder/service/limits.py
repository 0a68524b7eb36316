"""Limits how long a body may be, how long a request may take, and how many may wait.

A request whose client has gone, or whose time is over, is given up: it leaves the queues and the
threads, at the latest when the batch that is being computed is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

from fastapi import HTTPException, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kalm_encoder.service.batcher import Caller
from kalm_encoder.service.live import LiveTable, Version
from kalm_encoder.service.problems import answer_problem

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


def limit_time(app: ASGIApp, timeout_s: float) -> ASGIApp:
    """Return the application with a limit: a request is cancelled when it is late or abandoned.

    One that is late is answered 504, or 408 if its body has not arrived. One whose client has gone
    is not answered.
    """

    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        watching: asyncio.Task[None] | None = None
        begun = ended = gone = False

        async def watch() -> None:
            """Bring the end of the time forward when the client goes."""
            nonlocal gone
            await receive()  # nothing but a disconnect can follow a whole body
            if not ended:
                gone = True
                limit.reschedule(loop.time())

        async def heard() -> Message:
            nonlocal watching
            if watching is not None:
                await watching
                return {"type": "http.disconnect"}
            message = await receive()
            if not message.get("more_body", False):
                watching = asyncio.create_task(watch())
            return message

        async def said(message: Message) -> None:
            nonlocal begun, ended
            begun = True
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            async with asyncio.timeout(timeout_s) as limit:
                await app(scope, heard, said)
        except TimeoutError:
            if not limit.expired():
                raise
        finally:
            if watching is not None:
                watching.cancel()
        if limit.expired() and not gone and not begun:
            late = HTTPException(504, f"the answer was not ready within {timeout_s:g} s")
            if watching is None and scope["method"] == "POST":
                text = f"the request had not arrived within {timeout_s:g} s"
                late = HTTPException(408, text, {"Connection": "close"})
            response = await answer_problem(Request(scope), late)
            await response(scope, receive, send)

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

        The call holds its version, so a request ends on the version it began with. If this
        coroutine is cancelled, a call that waits for a thread is not begun any more, and one that
        runs ends when it next needs the device; it counts as pending until then.

        Raises:
            HTTPException: 503 if nothing is loaded yet, 429 if too many requests wait.
        """
        if (version := self.live.current) is None:
            raise HTTPException(503, "the model is being loaded", {"Retry-After": "5"})
        if len(self.pending) >= self.live.settings.max_pending:
            raise HTTPException(429, "too many requests are waiting", {"Retry-After": "1"})
        caller = Caller()
        future = self._threads.submit(caller.run, partial(answer, version, *args, **kwargs))
        self.pending.add(future)
        future.add_done_callback(self.pending.discard)
        try:
            return await asyncio.wrap_future(future)
        finally:
            caller.leave()
