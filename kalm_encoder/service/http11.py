"""Speaks HTTP/1.1 with every client, those that offer to go on in another protocol included.

The HTTP client of Java offers HTTP/2 with its first request (`Upgrade: h2c`). A server may ignore
the offer (RFC 9110, 7.8), and the body of the request is as it would be without it. uvicorn's other
parser, httptools, ends the request at the offer and loses the body.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http import auto
from uvicorn.protocols.http.h11_impl import H11Protocol


class Http11(H11Protocol):
    """uvicorn's protocol in pure Python, which ignores each offer without a word in the log."""

    def _should_upgrade(self) -> bool:
        return False


def use_http11() -> list[Any]:
    """Make this the protocol of a proxy of Ray Serve, which lets nobody choose it.

    Returns:
        The middleware to add, as Ray asks for: none.
    """
    auto.AutoHTTPProtocol = Http11
    return []
