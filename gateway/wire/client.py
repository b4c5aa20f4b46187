"""The client: one client's connection, from its bytes to its answers.

One state machine. HEAD: reading a request's head, or waiting for one. BODY: reading its body. ANSWERING:
a call has it; what the client sends meanwhile waits (pipelining). DISCARDING: the answer is sent and the
connection closes, once the client has been given the time to read it.
"""

from __future__ import annotations

import asyncio
import enum
import re
from http import HTTPStatus
from time import monotonic
from typing import Protocol, cast

from gateway.errors import BodyTooLargeError, GatewayError, MalformedRequestError, RequestTimeoutError
from gateway.wire.bodies import LAST_CHUNK, Body, body_of, chunk
from gateway.wire.heads import CHUNKED, END, LONGEST_HEAD_BYTES, RequestHead, parse_request

PIPELINED_BYTES = 64 << 10
"""Bytes of later requests that are kept while one is being answered; beyond, the client has to wait."""
DISCARD_S = 2.0
DISCARD_FACTOR = 8

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,18})\r\n", re.IGNORECASE)
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}


class State(enum.Enum):
    HEAD = "head"
    BODY = "body"
    ANSWERING = "answering"
    DISCARDING = "discarding"


class Call(Protocol):
    """A request that is being answered. It ends by the connection's ``send_whole`` or ``end``."""

    def abandon(self) -> None:
        """The client is away."""

    def pause(self) -> None:
        """The client reads slower than we send: send nothing more for now."""

    def resume(self) -> None: ...


class RequestHandler(Protocol):
    """What stands behind the clients."""

    clients: set[ClientConnection]
    stopping: bool

    @property
    def max_body_bytes(self) -> int: ...

    @property
    def header_timeout_s(self) -> float: ...

    @property
    def body_timeout_s(self) -> float: ...

    @property
    def keep_alive_s(self) -> float: ...

    def serve(self, client: ClientConnection, head: RequestHead, body: bytes) -> Call | None:
        """Begin to answer. None when the answer has been sent already."""

    def refuse(self, client: ClientConnection, error: GatewayError, head: RequestHead | None) -> None:
        """Answer a request that cannot be read, by ``send_whole``."""


class ClientConnection(asyncio.Protocol):
    __slots__ = (
        "_advancing",
        "_body",
        "_closing",
        "_data",
        "_discarded",
        "_handler",
        "_head",
        "_keep_alive",
        "_max_body",
        "_parts",
        "_paused",
        "_paused_reading",
        "_prefix",
        "_refused",
        "_size",
        "_suffix",
        "call",
        "connections",
        "old",
        "since",
        "state",
        "transport",
    )
    transport: asyncio.Transport

    def __init__(self, doorman: RequestHandler, connections: set[ClientConnection] | None = None) -> None:
        self._handler = doorman
        self.connections = connections
        """The server's own set, by which it knows when all are gone."""
        self.state = State.HEAD
        self.since = 0.0
        """When the present state began or, while a body is read, when data came last."""
        self.call: Call | None = None
        self._paused = False
        self._data = b""
        self._head: RequestHead | None = None
        self._body: Body | None = None
        self._parts: list[bytes] = []
        self._size = 0
        self._discarded = 0
        self._keep_alive = True
        self.old = False
        self._advancing = False
        self._paused_reading = False
        self._refused = False
        self._closing = False
        self._prefix = b""
        """The last request's head up to its length, and what follows that."""
        self._suffix = b""
        self._max_body = 0

    # what the loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.since = monotonic()
        self._handler.clients.add(self)
        if self.connections is not None:
            self.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._handler.clients.discard(self)
        if self.connections is not None:
            self.connections.discard(self)
        if self.call is not None:
            call, self.call = self.call, None
            call.abandon()
        self._data = b""
        self._parts = []

    def data_received(self, data: bytes) -> None:
        state = self.state
        if state is State.DISCARDING:
            self._discarded += len(data)
            if self._discarded > self._handler.max_body_bytes * DISCARD_FACTOR:
                self.transport.abort()
            return
        if self._data:
            data = self._data + data
        elif state is State.HEAD and self._prefix and data.startswith(self._prefix):
            # Nearly always: a whole request, with the same head as the last one but for its length.
            at = len(self._prefix)
            stop = data.find(b"\r", at, at + 20)
            digits = data[at:stop]
            start = stop + len(self._suffix)
            if stop > 0 and digits.isdigit() and data.startswith(self._suffix, stop):
                length = int(digits)
                head = self._head
                if len(data) == start + length and length <= self._max_body and head is not None:
                    self._begin(head, data[start:])
                    return
        if state is State.HEAD and not self._data:
            self.since = monotonic()  # a head begins to come
        self._data = data
        if state is State.ANSWERING:
            if len(self._data) > PIPELINED_BYTES and not self._paused_reading:
                self._paused_reading = True
                self.transport.pause_reading()
        else:
            self._advance()

    def eof_received(self) -> bool:
        return False  # whoever stops listening for the answer has left

    def pause_writing(self) -> None:
        self._paused = True
        if self.call is not None:
            self.call.pause()

    def resume_writing(self) -> None:
        self._paused = False
        if self.call is not None:
            self.call.resume()

    def shutdown(self) -> None:
        """The server stops: finish the present answer, take no further request."""
        self._keep_alive = False
        if self.state is State.HEAD:
            self.transport.close()

    # reading

    def _advance(self) -> None:
        """Read as far as the data goes."""
        if self._advancing:
            return
        self._advancing = True
        try:
            while self._data and not self._closing:
                if self.state is State.HEAD:
                    if not self._read_head():
                        return
                elif self.state is State.BODY:
                    if not self._read_body():
                        return
                else:
                    return
        except GatewayError as error:
            self.refuse(error)
        finally:
            self._advancing = False

    def _read_head(self) -> bool:
        """Whether there is more to do."""
        data = self._data
        end = data.find(END, 0, LONGEST_HEAD_BYTES)
        if end < 0:
            if data.startswith(b"\r\n"):  # an empty line before a request is to be read over
                self._data = data[2:]
                return True
            if len(data) > LONGEST_HEAD_BYTES:
                raise MalformedRequestError(
                    f"The head is longer than {LONGEST_HEAD_BYTES} bytes; send fewer or shorter headers.",
                    status=431,
                )
            return False
        if data.startswith(b"\r\n"):
            self._data = data[2:]
            return True
        self._head = None
        head = self._head = parse_request(data[:end])
        self._prefix = b""
        if head.length > 0 and not head.waits_for_continue:
            self._remember(data[: end + 4])
        self._keep_alive = head.keep_alive and not self._handler.stopping
        self.old = head.http_1_0
        self._data = data[end + 4 :]
        self._take_body(head)
        return True

    def _remember(self, head: bytes) -> None:
        """A client's requests mostly differ in their length alone: then the rest is not read again (and
        ``content-length`` among the headers is the first one's)."""
        at = _LENGTH.search(head)
        if at is not None:
            self._prefix, self._suffix = head[: at.start(1)], head[at.end(1) :]
            self._max_body = self._handler.max_body_bytes

    def _take_body(self, head: RequestHead) -> None:
        length = head.length
        if 0 <= length <= len(self._data) and length <= self._handler.max_body_bytes:
            body = self._data[:length]
            self._data = self._data[length:]
            self._begin(head, body)
        else:
            self._await_body(head)

    def _await_body(self, head: RequestHead) -> None:
        if head.length != CHUNKED and head.length > self._handler.max_body_bytes:
            raise self._too_large()
        self._body = body_of(head.length)
        self._parts, self._size = [], 0
        self.state = State.BODY
        self.since = monotonic()
        if head.waits_for_continue and not self._data:
            self.transport.write(_CONTINUE)

    def _read_body(self) -> bool:
        """Whether there is more to do."""
        assert self._body is not None
        assert self._head is not None
        try:
            part = self._body.feed(self._data)
        except ValueError as error:
            raise MalformedRequestError(f"The body is not chunked as it should be: {error}.") from None
        self._size += len(part)
        self._parts.append(part)
        self.since = monotonic()
        if self._size > self._handler.max_body_bytes:
            raise self._too_large()
        if not self._body.done:
            self._data = b""
            return False
        self._data = self._body.rest
        body = b"".join(self._parts)
        self._body, self._parts = None, []
        self._begin(self._head, body)
        return True

    def _too_large(self) -> BodyTooLargeError:
        limit = self._handler.max_body_bytes
        return BodyTooLargeError(
            f"The body is larger than the limit of {limit} bytes (gateway.max_body_bytes); send less "
            "context, or have the limit raised."
        )

    def _begin(self, head: RequestHead, body: bytes) -> None:
        self.state = State.ANSWERING
        call = self._handler.serve(self, head, body)
        if self.state is State.ANSWERING:
            self.call = call
            if self._paused and call is not None:  # it has not read the answer before this one yet
                call.pause()

    def refuse(self, error: GatewayError) -> None:
        """Answer what cannot be read, and close: where the next request would begin is unknown."""
        self._keep_alive = False
        self._refused = True
        self.state = State.ANSWERING
        self._handler.refuse(self, error, self._head)

    def sweep(self, now: float) -> None:
        """Called from time to time: end what takes too long."""
        waited = now - self.since
        if self.state is State.HEAD:
            if self._data:
                if waited > self._handler.header_timeout_s:
                    self.refuse(RequestTimeoutError("The head of the request did not come in time."))
            elif waited > self._handler.keep_alive_s:
                self.transport.close()
        elif self.state is State.BODY:
            if waited > self._handler.body_timeout_s:
                self.refuse(RequestTimeoutError("The body of the request did not come in time."))
        elif self.state is State.DISCARDING and waited > DISCARD_S:
            self.transport.abort()

    # answering; a head is the status line and header lines, each with its line end

    def send_whole(self, head: bytes, body: bytes, *, no_body: bool = False) -> None:
        """The whole answer. ``no_body`` sends the length of ``body`` alone, as HEAD wants it."""
        if self._closing:
            return
        close = b"" if self._keep_alive else b"connection: close\r\n"
        self.transport.write(
            b"%bcontent-length: %d\r\n%b\r\n%b" % (head, len(body), close, b"" if no_body else body)
        )
        self._finish()

    def begin(self, head: bytes, payload: bytes) -> None:
        """The head of an answer that comes in parts, and its first part. To HTTP/1.0, the end of the
        connection ends it."""
        if self.old:
            self._keep_alive = False
            self.transport.write(b"%bconnection: close\r\n\r\n%b" % (head, payload))
            return
        close = b"" if self._keep_alive else b"connection: close\r\n"
        framed = chunk(payload) if payload else b""
        self.transport.write(b"%btransfer-encoding: chunked\r\n%b\r\n%b" % (head, close, framed))

    def send(self, payload: bytes) -> None:
        """A further part; it must not be empty."""
        self.transport.write(payload if self.old else b"%x\r\n%b\r\n" % (len(payload), payload))

    def end(self, payload: bytes = b"") -> None:
        """The end of an answer that comes in parts."""
        if self._closing:
            return
        if self.old:
            self.transport.write(payload)
        else:
            self.transport.write((chunk(payload) if payload else b"") + LAST_CHUNK)
        self._finish()

    def abort(self) -> None:
        """End the connection within an answer, so that the client knows that it is not whole."""
        self.call = None
        self.transport.abort()

    def _finish(self) -> None:
        self.call = None
        self.since = monotonic()
        if not self._keep_alive:
            if self._refused:
                self._linger()
            else:
                self._closing = True
                self.transport.close()
            return
        self.state = State.HEAD
        if self._paused_reading:
            self._paused_reading = False
            self.transport.resume_reading()
        if self._data:
            self._advance()

    def _linger(self) -> None:
        """Read on for a while: a client that is still sending would see a reset instead of the answer."""
        self.state = State.DISCARDING
        self._data, self._parts, self._body = b"", [], None
        if self.transport.can_write_eof():
            self.transport.write_eof()
