"""Connections to engines: opened when needed, kept while fresh, one request at a time on each."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from time import monotonic
from typing import Protocol, cast
from urllib.parse import urlsplit

from gateway.wire.bodies import SIZES, Body, body_of
from gateway.wire.heads import END, LONGEST_HEAD_BYTES, UNTIL_CLOSE, AnswerHead, parse_answer

FRESH_S = 4.0
"""Below the 5 s after which vLLM closes an idle connection, so that few kept ones are stale."""
MOST_IDLE = 4096


class ResponseHandler(Protocol):
    """Who waits for an answer. After ``whole``, ``ended`` or ``lost`` nothing more is called."""

    def whole(self, head: AnswerHead, body: bytes) -> None:
        """All of an answer at once, instead of the three below."""

    def began(self, head: AnswerHead) -> None: ...

    def arrived(self, payload: bytes) -> None:
        """A part of the body, never empty."""

    def ended(self) -> None:
        """The answer is whole."""

    def lost(self, why: str, *, unread: bool) -> None:
        """It will not be. ``unread``: the connection was a kept one and not a byte came back, so the
        engine had closed it before the request."""


class EngineConnection(asyncio.Protocol):
    __slots__ = ("_asker", "_body", "_data", "_head", "_kept", "idle_since", "pool", "stream", "transport")
    transport: asyncio.Transport

    def __init__(self, pool: ConnectionPool) -> None:
        self.pool = pool
        self.idle_since = 0.0
        self.stream: Callable[[bytes], None] | None = None
        """Who takes the parts of a stream, once that has begun; set by the asker."""
        self._asker: ResponseHandler | None = None
        self._head: AnswerHead | None = None
        self._body: Body | None = None
        self._data = b""
        self._kept = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def send(self, asker: ResponseHandler, request: bytes) -> None:
        """Send a request; ``asker`` hears of the answer."""
        self._asker = asker
        self._head = None
        self.stream = None
        self.transport.write(request)

    def close(self) -> None:
        """Close at once, upon which vLLM aborts the request. Nobody is told."""
        self._asker = self.stream = None
        self.transport.abort()

    def pause(self) -> None:
        self.transport.pause_reading()

    def resume(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if (stream := self.stream) is not None and data.endswith(b"\r\n"):
            # Nearly always: one whole chunk of a stream.
            line_end = data.find(b"\r\n", 0, 16)
            size = SIZES.get(data[:line_end])
            body = self._body
            if size is not None and len(data) == line_end + size + 4 and body is not None and body.between:
                stream(data[line_end + 2 : -2])
                return
        asker = self._asker
        if asker is None:  # an engine that speaks unasked, or after its answer
            self.transport.abort()
            return
        try:
            head = self._head
            if head is None:
                if self._data:
                    data = self._data + data
                end = data.find(END)
                if end < 0:
                    self._await_head(data)
                    return
                head = parse_answer(data[:end])
                size = len(data) - end - 4
                if size == head.length and head.status >= 200 and head.keep_alive:
                    self._data = b""  # all of it at once, as short answers come
                    self._asker = None
                    self._kept = True
                    self.pool.keep(self)
                    asker.whole(head, data[end + 4 :])
                    return
                data = self._begin(data, end, head, asker)
                if self._head is None:
                    return
            self._read_body(data, asker)
        except ValueError as error:
            self._lose(f"it sent what is no HTTP answer: {error}")

    def _await_head(self, data: bytes) -> None:
        if len(data) > LONGEST_HEAD_BYTES:
            raise ValueError("a head that never ends")
        self._data = data

    def _begin(self, data: bytes, end: int, head: AnswerHead, asker: ResponseHandler) -> bytes:
        """What follows the head; those of preliminary answers are read over."""
        data = data[end + 4 :]
        while head.status < 200:
            end = data.find(END)
            if end < 0:
                self._await_head(data)
                return b""
            head = parse_answer(data[:end])
            data = data[end + 4 :]
        self._data = b""
        self._head = head
        self._body = body_of(head.length)
        asker.began(head)
        return data

    def _read_body(self, data: bytes, asker: ResponseHandler) -> None:
        body = self._body
        assert body is not None
        if data and not body.done:
            payload = body.feed(data)
            data = b""
            if payload and self._asker is not None:
                asker.arrived(payload)
        if body.done and self._asker is not None:
            self._end(asker, bool(body.rest or data))

    def _end(self, asker: ResponseHandler, more: bool) -> None:
        """``more``: bytes have come that no request asked for, which makes the connection unusable."""
        assert self._head is not None
        self._asker = self.stream = None
        if self._head.keep_alive and not more:
            self._kept = True
            self.pool.keep(self)
        else:
            self.transport.abort()
        asker.ended()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.pool.forget(self)
        self.stream = None
        asker = self._asker
        if asker is None:
            return
        if self._head is not None and self._head.length == UNTIL_CLOSE and exc is None:
            self._asker = None
            asker.ended()
            return
        self._lose(repr(exc) if exc else "it closed the connection")

    def _lose(self, why: str) -> None:
        asker, self._asker, self.stream = self._asker, None, None
        self.transport.abort()
        if asker is not None:
            asker.lost(why, unread=self._kept and self._head is None and not self._data)


class ConnectionPool:
    """Connections to one engine, by its base URL."""

    def __init__(self, url: str, connect_timeout_s: float) -> None:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if secure else 80)
        self._ssl = ssl.create_default_context() if secure else None
        self._connect_timeout_s = connect_timeout_s
        self._idle: list[EngineConnection] = []
        self.netloc = parts.netloc.rpartition("@")[2]
        self.base_path = parts.path.rstrip("/")

    def kept(self) -> EngineConnection | None:
        """A connection that is open and fresh, the one used last; None if there is none."""
        oldest = monotonic() - FRESH_S
        while self._idle:
            connection = self._idle.pop()
            if connection.idle_since >= oldest and not connection.transport.is_closing():
                return connection
            connection.close()
        return None

    async def connect(self) -> EngineConnection:
        """A new connection. Raises OSError, of which TimeoutError is one."""
        async with asyncio.timeout(self._connect_timeout_s):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: EngineConnection(self), self._host, self._port, ssl=self._ssl
            )
        return connection

    def keep(self, connection: EngineConnection) -> None:
        if len(self._idle) >= MOST_IDLE:
            connection.close()
            return
        connection.idle_since = monotonic()
        self._idle.append(connection)

    def forget(self, connection: EngineConnection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)

    def discard_idle(self) -> None:
        """Close all that are idle."""
        self.close()

    def sweep(self) -> None:
        """Close what is no longer fresh."""
        oldest = monotonic() - FRESH_S
        stale = [connection for connection in self._idle if connection.idle_since < oldest]
        self._idle = [connection for connection in self._idle if connection.idle_since >= oldest]
        for connection in stale:
            connection.close()

    def close(self) -> None:
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
