"""Cross-origin requests (the Fetch standard's CORS protocol), for pages of the origins in
``gateway.cors_origins``. Off unless there are some: then a page of another origin can neither read an answer
nor send JSON here.

Operators' routes under ``/admin`` are never opened: without keys they trust whoever is on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import unquote

from gateway.wire.heads import RequestHead
from tiercel_agents.headers import REASON_HEADER, REPLICA_HEADER, REQUEST_HEADER, VARIANT_HEADER

EVERYBODY = "*"
_EXPOSED = (
    f"access-control-expose-headers: {REQUEST_HEADER}, request-id, retry-after, {VARIANT_HEADER}, "
    f"{REPLICA_HEADER}, {REASON_HEADER}\r\n"
).encode()
_METHODS = b"access-control-allow-methods: GET, HEAD, POST, DELETE\r\naccess-control-max-age: 600\r\n"


class Cors:
    """What answers to other origins carry."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._everybody = EVERYBODY in origins
        self._origins = frozenset(origins)

    def lines(self, path: str, headers: Mapping[str, str]) -> bytes:
        """The header lines of an answer. Caches must know that they depend on who asks."""
        origin = headers.get("origin")
        vary = b"" if self._everybody else b"vary: origin\r\n"
        if origin is None or not self._allows(path, origin):
            return vary
        shown = EVERYBODY if self._everybody else origin
        return b"access-control-allow-origin: %b\r\n%b%b" % (shown.encode("latin-1"), vary, _EXPOSED)

    def preflight(self, head: RequestHead) -> bytes | None:
        """The head of the answer when a browser asks whether it may send a request; None if it does not."""
        if head.method != "OPTIONS" or "access-control-request-method" not in head.headers:
            return None
        lines = self.lines(head.path, head.headers)
        if b"access-control-allow-origin" not in lines:
            return b"HTTP/1.1 403 Forbidden\r\n" + lines
        wanted = head.headers.get("access-control-request-headers", "").encode("latin-1")
        allowed = b"access-control-allow-headers: %b\r\n" % wanted if wanted else b""
        return b"HTTP/1.1 200 OK\r\n" + lines + _METHODS + allowed

    def _allows(self, path: str, origin: str) -> bool:
        # The application reads paths with their percent signs decoded.
        return not unquote(path).startswith("/admin") and (self._everybody or origin in self._origins)
