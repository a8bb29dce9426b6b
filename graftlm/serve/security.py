"""Who may ask: keys in constant time, and hosts that a page in a browser cannot stand in for."""

import hashlib
import hmac
import ipaddress
from collections.abc import Callable, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from graftlm.serve import page
from graftlm.serve.errors import ApiError

OPEN = frozenset({"/health"}) | page.PATHS
"""Paths that answer without a key. The page holds nothing secret, and has to be there to ask for the key."""


def is_loopback(host: str) -> bool:
    """Whether a host (a name or an address, without its port) is this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def _host_of(header: str) -> str:
    """The host of a `Host` header, without its port."""
    if header.startswith("["):
        return header.partition("]")[0] + "]"
    return header.rpartition(":")[0] if ":" in header else header


class Guard:
    """ASGI middleware before everything else: refuses requests without a key, to other hosts, or while the server ends.

    Without keys, a server on a loopback address answers only requests that are addressed to a loopback host: a page
    whose name leads to 127.0.0.1 (DNS rebinding) names another. Pages of other origins cannot send JSON, as no answer
    allows them to.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[str],
        loopback_only: bool,
        is_draining: Callable[[], bool],
    ) -> None:
        self.app, self.loopback_only, self.is_draining = app, loopback_only, is_draining
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"] not in OPEN and (error := self._refusal(Headers(scope=scope))):
            headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
            await error.response(scope["path"], headers)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refusal(self, headers: Headers) -> ApiError | None:
        if self._digests and not self._knows(headers):
            return ApiError(
                401, "no valid API key: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`", code="invalid_key"
            )
        host = headers.get("host", "")
        if not self._digests and self.loopback_only and not is_loopback(_host_of(host)):
            return ApiError(
                403,
                f"the request is addressed to the host {host!r}, and without a key only localhost is answered. Start "
                "the server with --api-key",
                code="other_host",
            )
        if self.is_draining():
            return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=10)
        return None

    def _knows(self, headers: Headers) -> bool:
        """Compare with every key, whichever matches, so that the time says nothing."""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(digest, key) for key in self._digests]
        return any(matches) and bool(given)


def header_text(text: Any) -> str:
    """A text for a header: what is not printable ASCII as %XX."""
    return "".join(c if " " < c < "\x7f" and c != "%" else "".join(f"%{b:02X}" for b in c.encode()) for c in str(text))
