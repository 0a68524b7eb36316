"""Who may ask: those with the key, or on loopback without a key those who mean this machine."""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import ASGIApp, Receive, Scope, Send

from kalm_encoder.errors import InputError
from kalm_encoder.service.problems import answer_problem

NUM_SHOWN_CHARACTERS = 100
"""Number of characters of a Host that an error repeats."""

BearerKey = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


def who_may_ask(host: str) -> dict[str, Any]:
    """Return the settings of a service that listens at a host: its key, or whom it answers without.

    Raises:
        InputError: KALM_API_KEY is set but holds no key; see `read_key`.
    """
    key = read_key(os.environ.get("KALM_API_KEY"))
    return {"api_key": key, "only_loopback": key is None and is_loopback(host)}


def read_key(value: str | None) -> str | None:
    """Return the key that KALM_API_KEY holds, without the line end that files of secrets end with.

    Raises:
        InputError: It is set but holds no key, or one that no header of a request can hold.
    """
    if value is None:
        return None
    if not (key := value.strip()):
        raise InputError("KALM_API_KEY is set, but empty: unset it to serve without a key")
    if not key.isprintable():
        raise InputError("KALM_API_KEY holds a control character, which no client can send")
    return key


def read_origins(value: str | None) -> frozenset[str]:
    """Return the origins that a list with commas names.

    Raises:
        InputError: One of them is no origin: a scheme, a host and perhaps a port.
    """
    origins = frozenset(filter(None, map(str.strip, (value or "").split(","))))
    for origin in origins - {"*"}:
        scheme, separator, host = origin.partition("://")
        if not (scheme and separator and host) or "/" in host:
            raise InputError(
                f"--cors-origins {origin!r} is no origin: give it as a browser sends it, such as "
                "https://example.org or http://localhost:3000, without a path"
            )
    return origins


def key_check(key: str) -> Callable[[BearerKey], Awaitable[None]]:
    """Return a dependency that refuses requests without the bearer key (RFC 6750)."""

    async def check(sent: BearerKey) -> None:
        challenge = 'Bearer realm="kalm"'
        if sent is not None:
            # A header is bytes, which Starlette reads as Latin-1.
            if hmac.compare_digest(sent.credentials.strip().encode("latin-1"), key.encode()):
                return
            challenge += ', error="invalid_token"'
        raise HTTPException(401, "a valid bearer key is needed", {"WWW-Authenticate": challenge})

    return check


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is one of this machine that no other can reach."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        name = host.lower().rstrip(".")
        return name == "localhost" or name.endswith(".localhost")


def only_loopback(app: ASGIApp) -> ASGIApp:
    """Return the application, which refuses requests for a host that is not this machine.

    A page in a browser here can let its own name point to 127.0.0.1 and then read what a service
    without a key answers (DNS rebinding). It cannot choose the header Host, which holds that name.
    """

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        host = dict(scope.get("headers", ())).get(b"host", b"localhost").decode("latin-1")
        try:
            meant = is_loopback(urlsplit(f"//{host}").hostname or "")
        except ValueError:
            meant = False
        if scope["type"] != "http" or meant:
            await app(scope, receive, send)
            return
        text = (
            f"this service has no key and answers only to localhost, not to "
            f"{host[:NUM_SHOWN_CHARACTERS]!r}: set KALM_API_KEY, or let your proxy send "
            "`Host: localhost`"
        )
        response = await answer_problem(Request(scope), HTTPException(421, text))
        await response(scope, receive, send)

    return checked
