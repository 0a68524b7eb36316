"""Limits how long a body may be, how long a request may take, and how many may wait.

A request whose client has gone, or whose time is over, is given up: it leaves the queues and the
threads, at the latest when the batch that is being computed is done.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, Concatenate, ParamSpec, TypeVar

from fastapi import HTTPException, Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kalm_encoder.service import traces
from kalm_encoder.service.batcher import Caller
from kalm_encoder.service.live import LiveTable, Version
from kalm_encoder.service.problems import answer_problem

P = ParamSpec("P")
T = TypeVar("T")

LOADING = "the model is being loaded"
RETRY_LOADING_S = "5"
"""Seconds after which a client may ask again while the model is being loaded."""


def limit_body(app: ASGIApp, max_body: int) -> ASGIApp:
    """Return the application with a limit: reading a body raises HTTPException 413 or 415.

    Starlette's own limit answers with plain text where clients expect JSON. This one counts what
    arrives, as a Content-Length may be missing or wrong. A client that is still sending would not
    see the answer, so the rest is read and dropped, unless the client asked before sending.
    """

    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        received = 0
        headers = Headers(raw=scope.get("headers", []))

        async def checked() -> Message:
            nonlocal received
            too_long = HTTPException(
                413, f"the request is longer than {max_body} bytes", {"Connection": "close"}
            )
            length = headers.get("content-length", "")
            if "expect" in headers and length.isdecimal() and int(length) > max_body:
                raise too_long
            message = await receive()
            received += len(message.get("body", b""))
            if received > max_body:
                while message.get("more_body", False):
                    message = await receive()
                raise too_long
            if received and not message.get("more_body", False):
                _check_media_type(headers)
            return message

        await app(scope, checked, send)

    return limited


def _check_media_type(headers: Headers) -> None:
    """Refuse a body that is not said to be JSON, or is compressed.

    Raises:
        HTTPException: 415; it says what to send.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (
        kind.startswith("application/") and kind[-5:] == "+json"
    ):
        text = "send JSON, with the header Content-Type: application/json"
        raise HTTPException(415, text, {"Accept": "application/json"})
    if headers.get("content-encoding", "identity").lower() != "identity":
        text = "send the body without a Content-Encoding, not compressed"
        raise HTTPException(415, text, {"Accept-Encoding": "identity"})


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
        self,
        where: str | None,
        answer: Callable[Concatenate[Version, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Call `answer` with the live version and the arguments, and wait for what it returns.

        The version has only the rows that satisfy `where`, the predicate of the caller's key.

        The call holds its version, so a request ends on the version it began with. If this
        coroutine is cancelled, a call that waits for a thread is not begun any more, and one that
        runs ends when it next needs the device; it counts as pending until then.

        Raises:
            HTTPException: 503 if nothing is loaded yet, 429 if too many requests wait.
        """
        if (version := self.live.current) is None:
            raise HTTPException(503, LOADING, {"Retry-After": RETRY_LOADING_S})
        if len(self.pending) >= self.live.settings.max_pending:
            raise HTTPException(429, "too many requests are waiting", {"Retry-After": "1"})
        caller, waiting = Caller(), traces.waiting()
        seen = version.under(where)

        def work() -> T:
            if waiting is not None:
                waiting.taken("thread", time.time_ns())
            return answer(seen, *args, **kwargs)

        # In a copy of this context, so that spans and log lines know the request.
        future = self._threads.submit(copy_context().run, caller.run, work)
        self.pending.add(future)
        future.add_done_callback(self.pending.discard)
        try:
            return await asyncio.wrap_future(future)
        finally:
            caller.leave()
