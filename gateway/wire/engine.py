"""Connections to engines: opened when needed, kept while fresh, one request at a time on each."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from time import monotonic
from typing import Protocol, cast
from urllib.parse import urlsplit

from gateway.wire.bodies import SIZES, Body, body_of
from gateway.wire.flow import OTHER_SIDE, Flow
from gateway.wire.heads import END, LONGEST_HEAD_BYTES, UNTIL_CLOSE, AnswerHead, parse_answer
from gateway.wire.states import ENGINE, EngineEvent, EngineState

FRESH_S = 4.0
"""Below the 5 s after which vLLM closes an idle connection, so that few kept ones are stale."""
MOST_IDLE = 4096
PIECE_BYTES = 128 << 10
"""What is written of a large request at a time."""
RECENT_S = 0.005
"""A connection that has been idle for longer is asked whether it has been closed, before it is used again."""

# Names of their own, since an enum's member takes four times as long to look up.
FREE, WAITING = EngineState.FREE, EngineState.WAITING
READING, CLOSED = EngineState.READING, EngineState.CLOSED
_SENT, _PART, _KEPT = EngineEvent.SENT, EngineEvent.PART, EngineEvent.KEPT


Request = bytes | tuple[bytes | memoryview, ...]


class ResponseHandler(Protocol):
    """Who waits for an answer. After ``whole``, ``ended`` or ``lost`` nothing more is called, and the
    connection is not its own any more."""

    def whole(self, head: AnswerHead, body: bytes) -> None:
        """All of an answer at once, instead of the three below."""

    def began(self, head: AnswerHead) -> None: ...

    def arrived(self, payload: bytes) -> None:
        """A part of the body, never empty."""

    def ended(self) -> None:
        """The answer is whole."""

    def lost(self, why: str, *, unread: bool) -> None:
        """It will not be. ``unread``: the engine provably did not begin to work on the request."""


class EngineConnection(asyncio.Protocol):
    """What may happen when stands in the second table of ``wire/states.py``."""

    __slots__ = (
        "_body",
        "_data",
        "_handler",
        "_head",
        "_heard",
        "_sent",
        "_sent_before",
        "_unsent",
        "flow",
        "idle_since",
        "pool",
        "state",
        "stream",
        "transport",
        "was_kept",
        "write_paused",
    )
    transport: asyncio.Transport
    flow: Flow

    def __init__(self, pool: ConnectionPool) -> None:
        self.pool = pool
        self.state = FREE
        self.idle_since = 0.0
        self.was_kept = False
        """It was taken from the kept ones; else it is new."""
        self.stream: Callable[[bytes], None] | None = None
        """Who takes the parts of a stream, once that has begun; set by the handler."""
        self.write_paused = False
        self._handler: ResponseHandler | None = None
        self._head: AnswerHead | None = None
        self._body: Body | None = None
        self._data = b""
        self._heard = False
        """Something of the present answer has come."""
        self._sent = self._sent_before = 0
        """Bytes of all requests, and of those before the present one."""
        self._unsent: Iterator[bytes | memoryview] | None = None
        """What is left to be written of a large request."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.flow = Flow(self.transport)

    # what its user does

    def send(self, handler: ResponseHandler, request: Request) -> None:
        """Send a request, whole or a large one in parts; ``handler`` hears of the answer, and never within
        this call."""
        closed = self.state is CLOSED
        self.state = ENGINE[self.state][_SENT]
        self._handler = handler
        self.stream = None
        if closed:  # nothing is written, so nothing can have been read
            asyncio.get_running_loop().call_soon(partial(self._lose, "it closed the connection", unread=True))
            return
        self._heard = False
        self._sent_before = self._sent
        if isinstance(request, bytes):
            self._sent += len(request)
            self.transport.write(request)
        else:
            self._sent += sum(map(len, request))
            self._unsent = _pieces(request)
            self._write_on()

    def _write_on(self) -> None:
        """Write the next piece of a large request, and those after it when others have had their turn, as
        long as they are taken."""
        if self._unsent is None or self.write_paused:
            return
        piece = next(self._unsent, None)
        if piece is None:
            self._unsent = None
            return
        self.transport.write(piece)
        if not self.write_paused:
            asyncio.get_running_loop().call_soon(self._write_on)

    @property
    def _all_sent(self) -> bool:
        return self._unsent is None and not self.write_paused

    def close(self) -> None:
        """Close at once, upon which vLLM aborts the request. Nobody is told."""
        self._handler = None
        self._cut()

    def pause(self) -> None:
        """Read no more of the answer for now. Without effect once the answer has ended."""
        if self._handler is not None:
            self.flow.hold(OTHER_SIDE)

    def resume(self) -> None:
        self.flow.release(OTHER_SIDE)

    def quiet(self) -> bool:
        """Whether no byte waits that nobody asked for, and no end that the loop has not seen yet."""
        return self.flow.quiet()

    # what the loop calls

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False
        self._write_on()

    def data_received(self, data: bytes) -> None:
        if (stream := self.stream) is not None and data.endswith(b"\r\n"):
            # Nearly always: one whole chunk of a stream.
            line_end = data.find(b"\r\n", 0, 16)
            size = SIZES.get(data[:line_end])
            body = self._body
            if size is not None and len(data) == line_end + size + 4 and body is not None and body.between:
                stream(data[line_end + 2 : -2])
                return
        handler = self._handler
        if handler is None:  # an engine that speaks unasked, or after its answer
            self._cut()
            return
        if self.state is READING:
            self._read_body(data, handler)
            return
        if self._data:
            data = self._data + data
        try:
            while True:
                end = data.find(END, 0, LONGEST_HEAD_BYTES)
                if end < 0:
                    if len(data) >= LONGEST_HEAD_BYTES:
                        raise ValueError("a head that never ends")
                    self._data = data
                    self._heard = True
                    return
                head = parse_answer(data[:end])
                data = data[end + 4 :]
                if head.status >= 200:
                    break
                if head.status == 101:
                    raise ValueError("it switches to another protocol")
        except ValueError as error:
            self._lose(f"it sent what is no HTTP answer: {error}", unread=False)
            return
        if self._data:
            self._data = b""
        if (
            len(data) == head.length
            and head.keep_alive
            and not (self.flow.held or self.write_paused or self._unsent is not None)
        ):
            self.state = ENGINE[self.state][_KEPT]  # all of it at once, as short answers come
            self._handler = None
            self.pool.keep(self)
            handler.whole(head, data)
        else:
            self._begin(head, data, handler)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        handler, head = self._handler, self._head
        until_close = head is not None and head.length == UNTIL_CLOSE
        if handler is not None and self.state is READING and until_close and exc is None:
            self._end(handler, clean=False)
            return
        self._lose(repr(exc) if exc else "it closed the connection", unread=self._unread(exc))

    # the answer

    def _begin(self, head: AnswerHead, data: bytes, handler: ResponseHandler) -> None:
        """The head has come, and ``data`` of what follows it."""
        self.state = ENGINE[self.state][EngineEvent.HEAD]
        self._head = head
        self._body = body_of(head.length)
        handler.began(head)
        if self._handler is handler and (data or self._body.done):
            self._read_body(data, handler)

    def _read_body(self, data: bytes, handler: ResponseHandler) -> None:
        body, head = self._body, self._head
        assert body is not None
        assert head is not None
        try:
            payload = body.feed(data)
        except ValueError as error:
            self._lose(f"it sent what is no HTTP answer: {error}", unread=False)
            return
        if not body.done:
            self.state = ENGINE[self.state][_PART]
        if payload:
            handler.arrived(payload)
        if body.done and self._handler is handler:
            self._end(handler, clean=head.keep_alive and not body.rest)

    def _end(self, handler: ResponseHandler, *, clean: bool) -> None:
        """The answer is whole. ``clean``: another request may follow it."""
        self._handler = self.stream = None
        self._head = self._body = None
        self.flow.release(OTHER_SIDE)  # whoever was slower than this answer has nothing more to take
        if clean and self.flow.reusable and self._all_sent:
            self.state = ENGINE[self.state][_KEPT]
            self.pool.keep(self)
        else:
            self.state = ENGINE[self.state][EngineEvent.LAST]
            self._unsent = None
            self.transport.abort()
        handler.ended()

    def _lose(self, why: str, *, unread: bool) -> None:
        handler, self._handler = self._handler, None
        self._cut()
        if handler is not None:
            handler.lost(why, unread=unread)

    def _cut(self) -> None:
        self.state = ENGINE[self.state][EngineEvent.GONE]
        self.stream = self._unsent = None
        self.pool.forget(self)
        self.transport.abort()

    def _unread(self, exc: Exception | None) -> bool:
        """Whether the engine has provably not begun to work on the request that is lost: it was sent over a
        kept connection that the engine was just closing.

        Proof is the end of the connection (FIN) that acknowledges nothing of the request: the engine had
        closed before. A reset without such an end proves nothing, however soon it comes, and even where
        nothing was acknowledged: acknowledgements are sent late, and what has been read may be reset before.
        Linux tells them apart (after an end, a reset is EPIPE). Where the system cannot tell what was
        acknowledged (TLS, other systems) there is no proof.
        """
        if self.state is CLOSED:
            return True  # it was never written
        if self._heard or self.state is not WAITING or not self.was_kept:
            return False
        if isinstance(exc, ConnectionResetError):
            return False
        taken = self.flow.acknowledged()
        return taken is not None and taken <= self._sent_before


def _pieces(parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    for part in parts:
        view = memoryview(part)
        yield from (view[at : at + PIECE_BYTES] for at in range(0, len(view), PIECE_BYTES))


class ConnectionPool:
    """Connections to one engine, by its base URL."""

    def __init__(self, url: str, connect_timeout_s: float) -> None:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if secure else 80)
        self._ssl = ssl.create_default_context() if secure else None
        self._connect_timeout_s = connect_timeout_s
        self._idle: dict[EngineConnection, None] = {}
        """Those that are clean, the one used last at the end."""
        self._closed = False
        self.netloc = parts.netloc.rpartition("@")[2]
        self.base_path = parts.path.rstrip("/")

    def kept(self) -> EngineConnection | None:
        """A connection that is open and fresh, the one used last; None if there is none."""
        now = monotonic()
        while self._idle:
            connection, _ = self._idle.popitem()
            idle_s = now - connection.idle_since
            fresh = idle_s < FRESH_S and not connection.transport.is_closing()
            if fresh and (idle_s < RECENT_S or connection.quiet()):
                connection.was_kept = True
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
        """Called by a connection that is clean."""
        if self._closed or len(self._idle) >= MOST_IDLE:
            connection.close()
            return
        connection.idle_since = monotonic()
        self._idle[connection] = None

    def forget(self, connection: EngineConnection) -> None:
        self._idle.pop(connection, None)

    @property
    def idle(self) -> Collection[EngineConnection]:
        return self._idle.keys()

    def sweep(self) -> None:
        """Close what is no longer fresh."""
        oldest = monotonic() - FRESH_S
        for connection in [c for c in self._idle if c.idle_since < oldest]:
            connection.close()

    def discard_idle(self) -> None:
        """Close all that are kept: one of them was found to be closed, so the others are likely to be."""
        for connection in tuple(self._idle):
            connection.close()

    def close(self) -> None:
        """Keep none from now on; those in use end with their answers."""
        self._closed = True
        self.discard_idle()
