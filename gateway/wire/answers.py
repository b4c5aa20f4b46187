"""Answers, written to a client in the order of its requests, each once."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from time import monotonic
from typing import Protocol

from gateway.errors import GatewayError
from gateway.wire.bodies import LAST_CHUNK, chunk
from gateway.wire.requests import RequestReader
from gateway.wire.states import CLIENT, ClientEvent, ClientState, OutOfOrderError

# Names of their own, since an enum's member takes four times as long to look up.
IDLE, REFUSING, STREAMING = ClientState.IDLE, ClientState.REFUSING, ClientState.STREAMING
CLOSED = ClientState.CLOSED
_ANSWERED, _LAST, _REFUSAL = ClientEvent.ANSWERED, ClientEvent.LAST, ClientEvent.REFUSAL
_BEGUN, _ENDED, _FINAL = ClientEvent.BEGUN, ClientEvent.ENDED, ClientEvent.FINAL

_CLOSE, _KEEP_ALIVE = b"connection: close\r\n", b"connection: keep-alive\r\n"
_BODILESS = (b"204", b"304")
STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}


class Call(Protocol):
    """A request that is being answered. It ends by the connection's ``send_whole``, ``end`` or ``abort``."""

    def abandon(self) -> None:
        """The client is away."""

    def pause(self) -> None:
        """The client reads slower than we send: send nothing more for now."""

    def resume(self) -> None: ...


class AnswerWriter:
    """The half of a client's connection that writes. Raises OutOfOrderError for what would cross or double
    an answer; after the connection is closed it writes nothing.

    A head is the status line and header lines, each with its line end.
    """

    transport: asyncio.Transport

    def __init__(self, reader: RequestReader) -> None:
        self._reader = reader
        self.state = IDLE
        self.since = 0.0
        self.call: Call | None = None
        self.old = False
        """The request is of HTTP/1.0."""
        self._closes = False
        """The connection ends after the present answer."""
        self._overloaded: GatewayError | None = None
        """Why the requests behind the present one had to be dropped."""

    def send_whole(self, head: bytes, body: bytes, *, no_body: bool = False) -> None:
        """The whole answer. To a HEAD request, or with ``no_body``, the length of ``body`` alone is sent."""
        state, reader = self.state, self._reader
        if self._closes:
            self.state = CLIENT[state][_REFUSAL if state is REFUSING else _LAST]
            connection = _CLOSE
        else:
            self.state = CLIENT[state][_ANSWERED]
            connection = _KEEP_ALIVE if self.old else b""
        if state is CLOSED:
            return
        self.call = None
        if head[9:12] in _BODILESS:
            self.transport.write(b"%b%b\r\n" % (head, connection))
        else:
            sent = b"" if no_body or reader.is_head else body
            self.transport.write(b"%bcontent-length: %d\r\n%b\r\n%b" % (head, len(body), connection, sent))
        if self.state is not IDLE or reader.data or reader.held.size or self._overloaded is not None:
            self._finish()
        else:
            self.since = monotonic()

    def begin(self, head: bytes, payload: bytes) -> None:
        """The head of an answer that comes in parts, and its first part. To HTTP/1.0, the end of the
        connection ends it."""
        state, self.state = self.state, CLIENT[self.state][_BEGUN]
        if state is CLOSED:
            return
        if self.old:
            self._closes = True
        close = _CLOSE if self._closes else b""
        if self._reader.is_head:
            self.transport.write(b"%b%b\r\n" % (head, close))
        elif self.old:
            self.transport.write(b"%b%b\r\n%b" % (head, close, payload))
        else:
            framed = chunk(payload) if payload else b""
            self.transport.write(b"%btransfer-encoding: chunked\r\n%b\r\n%b" % (head, close, framed))

    def send(self, payload: bytes) -> None:
        """A further part; it must not be empty."""
        if self.state is STREAMING:
            if not self._reader.is_head:
                self.transport.write(payload if self.old else b"%x\r\n%b\r\n" % (len(payload), payload))
        elif self.state is not CLOSED:
            raise OutOfOrderError(f"a part of an answer cannot be sent in {self.state.name}")

    def end(self, payload: bytes = b"") -> None:
        """The end of an answer that comes in parts."""
        state, self.state = self.state, CLIENT[self.state][_FINAL if self._closes else _ENDED]
        if state is CLOSED:
            return
        self.call = None
        if not self._reader.is_head:
            if not self.old:
                self.transport.write((chunk(payload) if payload else b"") + LAST_CHUNK)
            elif payload:
                self.transport.write(payload)
        self._finish()

    def _finish(self) -> None:
        """An answer has ended, and the state is the one after it."""
        raise NotImplementedError
