"""Requests that are not on the hot path: an ASGI application answers them (ASGI 3.0, HTTP)."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp

from gateway.errors import UnexpectedError
from gateway.telemetry.logs import EVENTS
from gateway.wire.client import STATUS_LINES, ClientConnection
from gateway.wire.heads import RequestHead

_OURS = frozenset((b"content-length", b"transfer-encoding", b"connection"))
"""Headers of an answer that the client writes itself."""
_NOT_ASCII = re.compile(r"[\x80-\xff]")


class AsgiCall:
    """One request in the application's hands. Answers are collected and sent whole: pages and figures,
    never a stream of tokens."""

    def __init__(
        self,
        app: ASGIApp,
        client: ClientConnection,
        head: RequestHead,
        body: bytes,
        date: Callable[[], bytes],
        more: bytes = b"",
    ):
        """``more``: header lines that every answer gets."""
        self._client = client
        self._no_body = head.method == "HEAD"
        self._body: bytes | None = body
        self._date = date
        self._more = more
        self._gone = asyncio.Event()
        self._status = 500
        self._headers: list[tuple[bytes, bytes]] = []
        self._parts: list[bytes] = []
        self._sent = False
        self.task = asyncio.get_running_loop().create_task(self._run(app, _scope(client, head)))

    def abandon(self) -> None:
        self._gone.set()
        self.task.cancel()

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    async def _run(self, app: ASGIApp, scope: dict[str, Any]) -> None:
        try:
            await app(scope, self._receive, self._send)
        except Exception as error:
            # The application's own handler has answered by now, if it could; Starlette raises again.
            fields = {"path": scope["path"], "cause": UnexpectedError(error).internal}
            logging.getLogger(EVENTS).error("a page failed", extra={"fields": fields})
        if not self._sent and not self._gone.is_set():
            self._status, self._headers, self._parts = 500, [], [b"The gateway failed; its log says why.\n"]
            self._finish()

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
        elif message["type"] == "http.response.body":
            self._parts.append(bytes(message.get("body", b"")))
            if not message.get("more_body", False):
                self._finish()

    def _finish(self) -> None:
        if self._sent or self._gone.is_set():
            return
        self._sent = True
        lines = [STATUS_LINES[self._status], self._date(), self._more]
        lines += [b"%b: %b\r\n" % pair for pair in self._headers if pair[0].lower() not in _OURS]
        self._client.send_whole(b"".join(lines), b"".join(self._parts), no_body=self._no_body)


def _in_ascii(part: str) -> str:
    """A part of the target with what is not ASCII percent-encoded: nobody fails on it, whatever it is."""
    return _NOT_ASCII.sub(lambda byte: f"%{ord(byte[0]):02X}", part)


def _scope(connection: ClientConnection, head: RequestHead) -> dict[str, Any]:
    transport = connection.transport
    client, server = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
    path = _in_ascii(head.path)
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.0" if head.http_1_0 else "1.1",
        # HEAD is GET without the body (RFC 9110, section 9.3.2): the application needs to know of one only.
        "method": "GET" if head.method == "HEAD" else head.method,
        "scheme": "https" if transport.get_extra_info("sslcontext") else "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": _in_ascii(head.query).encode(),
        "root_path": "",
        "headers": [
            (name.encode("latin-1"), value.encode("latin-1")) for name, value in head.headers.items()
        ],
        "client": tuple(client[:2]) if isinstance(client, tuple) else None,
        "server": tuple(server[:2]) if isinstance(server, tuple) else None,
        "state": {},
    }
