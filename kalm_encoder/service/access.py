"""Who may ask: those with a key, or on loopback without a key those who mean this machine.

A key may see all rows of the table, or only those that satisfy its predicate.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from ipaddress import ip_address
from pathlib import Path
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


def who_may_ask(host: str, file: Path | None = None) -> dict[str, Any]:
    """Return the settings of a service that listens at a host: its keys, or whom it answers.

    Args:
        host: The name or address.
        file: File of the keys that see only some rows; see `read_keys`. The key in KALM_API_KEY
            sees all rows.

    Raises:
        InputError: KALM_API_KEY is set but holds no key, or the file is not as it should be.
    """
    keys = {} if file is None else read_keys(file)
    if (key := read_key(os.environ.get("KALM_API_KEY"))) is not None:
        if key in keys:
            raise InputError(f"the key in KALM_API_KEY is in {file} as well: give it one meaning")
        keys[key] = None
    return {"keys": keys, "only_loopback": not keys and is_loopback(host)}


def read_keys(file: Path) -> dict[str, str | None]:
    """Read a JSON object that maps keys to predicates; a key with null sees all rows.

    Raises:
        InputError: The file cannot be read or has another form. No message shows a key.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise InputError(f"{file} has a key twice: give it one predicate")
        return dict(pairs)

    form = f"{file} must be a JSON object that maps each key to a predicate, or null for all rows"
    try:
        found = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=distinct)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {error}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{form}: {error}") from error
    if not isinstance(found, dict) or not found:
        raise InputError(form)
    for number, (key, predicate) in enumerate(found.items(), start=1):
        if not key or key != key.strip() or not key.isprintable():
            raise InputError(
                f"key {number} of {file} is empty, or holds a space at an end or a control "
                "character: no client can send it"
            )
        if predicate is not None and not (isinstance(predicate, str) and predicate.strip()):
            raise InputError(
                f"the predicate of key {number} of {file} is {json.dumps(predicate)}: give one "
                "such as \"tenant = 'a'\", or null if the key sees all rows"
            )
    return found


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


def key_check(keys: Mapping[str, str | None]) -> Callable[..., Awaitable[str | None]]:
    """Return a dependency that refuses requests without one of the bearer keys (RFC 6750).

    It gives the predicate of the key, or None if the key sees all rows, as all may without keys.
    """

    async def anybody() -> None:
        return None

    async def check(sent: BearerKey) -> str | None:
        challenge = 'Bearer realm="kalm"'
        if sent is not None:
            # A header is bytes, which Starlette reads as Latin-1. All keys are compared, so that
            # the time does not tell which one it is.
            given = sent.credentials.strip().encode("latin-1")
            equal = [k for k in keys if hmac.compare_digest(given, k.encode())]
            if equal:
                return keys[equal[0]]
            challenge += ', error="invalid_token"'
        raise HTTPException(401, "a valid bearer key is needed", {"WWW-Authenticate": challenge})

    return check if keys else anybody


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
