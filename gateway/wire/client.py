"""A client's connection, from its bytes to its answers. What may happen when stands in the first table of
``wire/states.py``; who is read, parsed and kept is decided in ``wire/flow.py``.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import Protocol, cast

from gateway.errors import GatewayError, RequestTimeoutError, UnexpectedError
from gateway.telemetry.logs import EVENTS
from gateway.wire.answers import STATUS_LINES, AnswerWriter, Call
from gateway.wire.flow import BACKLOG, TURN, UNCOUNTED_BYTES, WRITE_BUFFER, Admission, Flow, Intake
from gateway.wire.heads import RequestHead
from gateway.wire.requests import PART_BYTES, Received, RequestReader
from gateway.wire.states import CLIENT, ClientEvent, ClientState

__all__ = ["STATUS_LINES", "Call", "ClientConnection", "RequestHandler"]

PIPELINED_BYTES = 64 << 10
"""Bytes of later requests that are kept while one is being answered; beyond, the client has to wait."""
MOST_AT_ONCE = 16
"""Pipelined requests that are answered before other connections have their turn."""
DRAINED_BYTES = 64 << 20
DRAIN_SILENCE_S = 2.0
DRAIN_S = 10.0
"""What a client may still send, and for how long, after it has been refused."""

# Names of their own, since an enum's member takes four times as long to look up.
IDLE, HEAD, BODY = ClientState.IDLE, ClientState.HEAD, ClientState.BODY
ANSWERING, STREAMING = ClientState.ANSWERING, ClientState.STREAMING
DRAINING, CLOSING, CLOSED = ClientState.DRAINING, ClientState.CLOSING, ClientState.CLOSED
_REQUEST = ClientEvent.REQUEST

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class RequestHandler(Protocol):
    """What stands behind the clients' connections."""

    clients: set[ClientConnection]
    stopping: bool
    intake: Intake

    @property
    def header_timeout_s(self) -> float: ...

    @property
    def body_timeout_s(self) -> float: ...

    @property
    def keep_alive_s(self) -> float: ...

    def admit(self, head: RequestHead) -> Admission:
        """Whether a request's body may come. Asked once per request, before a byte of that is kept; cheap
        for a head that was asked about before. Raises GatewayError."""

    def serve(self, client: ClientConnection, head: RequestHead, body: Received) -> Call | None:
        """Begin to answer. None when the answer has been sent already."""

    def refuse(self, client: ClientConnection, error: GatewayError, head: RequestHead | None) -> None:
        """Answer a request that is not served, by ``send_whole``. ``head`` is None when it was not read."""


class ClientConnection(AnswerWriter, asyncio.Protocol):
    flow: Flow

    def __init__(self, handler: RequestHandler, connections: set[ClientConnection] | None = None) -> None:
        """``connections``: the server's own set, by which it knows when all are gone."""
        self._handler = handler
        self.connections = connections
        super().__init__(RequestReader(handler.intake))
        self.since = 0.0
        """When the present state began. While a body is read or drained: when data came last. While the
        client does not take what was sent: when it last took some."""
        self._began = 0.0
        """When the present body, or the draining, began."""
        self._refused = False
        self._drained = 0
        self._unsent = 0
        self._advancing = False

    # what the loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.flow = Flow(self.transport)
        self.since = monotonic()
        self._handler.clients.add(self)
        if self.connections is not None:
            self.connections.add(self)
        intake = self._handler.intake
        try:
            intake.opened()
        except GatewayError as error:
            if intake.crowded:
                self.abort()
            else:
                self._refuse(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._handler.intake.closed()
        self._handler.clients.discard(self)
        if self.connections is not None:
            self.connections.discard(self)
        self._leave()

    def data_received(self, data: bytes) -> None:
        state, reader = self.state, self._reader
        if state is IDLE and reader.prefix and not (reader.data or self.flow.held):
            at = len(reader.prefix)
            if data.startswith(reader.prefix):
                # Nearly always: a whole request, with the same head as the last one but for its length.
                stop = data.find(b"\r", at, at + 20)
                digits = data[at:stop]
                start = stop + len(reader.suffix)
                if stop > 0 and digits.isdigit() and data.startswith(reader.suffix, stop):
                    head = reader.head
                    if head is not None and len(data) == start + int(digits):
                        self._serve(head, data[start:])
                        return
        elif state is DRAINING:
            self._drain(len(data))
            return
        elif state is CLOSING or state is CLOSED:
            return
        reader.add(data)
        self._advance()

    def eof_received(self) -> bool:
        """Whoever stops listening for the answer has left."""
        if self.state is ANSWERING or self.state is STREAMING:
            self._leave()
            self.transport.abort()
        elif self.state is not CLOSED:
            self._close()
        return False

    def pause_writing(self) -> None:
        self.flow.hold(WRITE_BUFFER)
        self._unsent = self.transport.get_write_buffer_size()
        self.since = monotonic()
        if self.call is not None:
            self.call.pause()

    def resume_writing(self) -> None:
        self.since = monotonic()
        if self.state is BODY:
            self._began = self.since
        self.flow.release(WRITE_BUFFER)
        if self.call is not None:
            self.call.resume()
        elif self._reader.data:
            self._advance()

    def grow(self, size: int) -> None:
        """The request that is being answered takes ``size`` bytes by now: it was compressed, or is a whole
        conversation. Raises OverloadedError or TenantOverloadedError where there is no room for them."""
        if self.state is ANSWERING or self.state is STREAMING:
            self._reader.grow(size)

    def shutdown(self) -> None:
        """The server stops: finish the present answer, take no further request."""
        self._closes = True
        if self.state is IDLE or self.state is HEAD:
            self._close()

    # reading

    def _advance(self) -> None:
        """Read as far as the data goes, and as the flow allows."""
        if self._advancing:
            return
        self._advancing = True
        reader, answered = self._reader, 0
        try:
            while reader.data and self.flow.may_parse:
                if self.state is BODY:
                    self._read_body()
                elif self.state is IDLE or self.state is HEAD:
                    self._read_head()
                else:
                    break
                if self.state is HEAD or (self.state is IDLE and not reader.begun):
                    break
                if self.state is IDLE and (answered := answered + 1) >= MOST_AT_ONCE:
                    self._yield_turn()
        except GatewayError as error:
            self._refuse(error)
        finally:
            self._advancing = False
        if reader.waits:
            self._mind_backlog()

    def _yield_turn(self) -> None:
        """Let other connections have their turn."""
        self.flow.hold(TURN)
        asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self.flow.release(TURN)
        self._advance()

    def _mind_backlog(self) -> None:
        """Bytes are left that cannot be used yet: count them, and hold the client back from sending more."""
        answering = self.state is ANSWERING or self.state is STREAMING
        try:
            self._reader.count(answering=answering)
        except GatewayError as error:
            if answering:
                self._overloaded = error
                self.flow.hold(BACKLOG)
            else:
                self._refuse(error)
            return
        if self._reader.unread > PIPELINED_BYTES:
            self.flow.hold(BACKLOG)
        elif self._overloaded is None:
            self.flow.release(BACKLOG)

    def _read_head(self) -> None:
        reader = self._reader
        whole = reader.read_head()
        if not whole:
            if reader.begun:
                if self.state is IDLE:
                    self.since = monotonic()
                self.state = CLIENT[self.state][ClientEvent.PART]
            return
        head = reader.head
        assert head is not None
        self.old = head.http_1_0
        self._closes = self._closes or not head.keep_alive or self._handler.stopping
        body = reader.take_whole(head)
        if body is not None:
            self._serve(head, body)
            return
        reader.await_body(head, self._handler.admit(head))
        self.state = CLIENT[self.state][ClientEvent.ADMITTED]
        self.since = self._began = monotonic()
        if head.waits_for_continue and not reader.data:
            self.transport.write(_CONTINUE)

    def _read_body(self) -> None:
        large = len(self._reader.data) >= PART_BYTES
        body, head = self._reader.read_body(), self._reader.head
        assert head is not None
        self.since = monotonic()
        if body is None:
            self.state = CLIENT[self.state][ClientEvent.PART]
            if large:  # the loop would go on reading as long as there is something
                self._yield_turn()
        else:
            self._serve(head, body)

    def _serve(self, head: RequestHead, body: Received) -> None:
        """A whole request is here. Whatever becomes of it, it is known where the next one begins."""
        awaited = self.state is BODY
        self.state = CLIENT[self.state][_REQUEST]
        try:
            if not awaited:
                admission, size = self._handler.admit(head), len(body)
                if size > UNCOUNTED_BYTES or size > admission.max_body_bytes:
                    self._reader.admit(admission, size)
                else:
                    self._reader.admission = admission
            call = self._handler.serve(self, head, body)
        except GatewayError as error:
            self._handler.refuse(self, error, head)
            return
        except Exception as error:
            logging.getLogger(EVENTS).exception("a request could not be served")
            if self.state is not ANSWERING:
                self.abort()
            else:
                self._handler.refuse(self, UnexpectedError(error), head)
            return
        if call is not None and (self.state is ANSWERING or self.state is STREAMING):
            self.call = call
            if self.flow.held & WRITE_BUFFER:
                call.pause()

    def _refuse(self, error: GatewayError) -> None:
        """Answer what cannot be read or may not come, and close: where the next request would begin is
        unknown."""
        self.state = CLIENT[self.state][ClientEvent.REFUSED]
        self._closes = self._refused = True
        self._reader.drop()
        self._handler.refuse(self, error, self._reader.head)

    def _drain(self, size: int) -> None:
        if not self._unsent:
            self.since = monotonic()
        self._drained += size
        if self._drained > DRAINED_BYTES:
            self.abort()

    # from time to time

    def sweep(self, now: float) -> None:
        """Called from time to time: end what takes too long."""
        state, handler = self.state, self._handler
        waited = now - self.since
        if state is CLOSED:
            return
        if state is ANSWERING or state is STREAMING:  # how long that may take is the call's to say
            if self.flow.held and self.flow.hung_up():
                self._leave()
                self.transport.abort()
        elif self.flow.held & WRITE_BUFFER or (self._unsent and state in (DRAINING, CLOSING)):
            unsent, before = self.transport.get_write_buffer_size(), self._unsent
            self._unsent = unsent
            if unsent < before:
                self.since = self._began = now
            elif waited > handler.keep_alive_s:
                self.abort()
        elif state is DRAINING:
            if waited > DRAIN_SILENCE_S or now - self._began > DRAIN_S:
                self.abort()
        elif state is IDLE:
            if waited > handler.keep_alive_s:
                self._close()
            else:
                self._reader.forget_large_head()
        elif state is HEAD:
            limit = handler.header_timeout_s
            if waited > limit:
                self._time_out(f"head did not come within {limit:g} s (gateway.header_timeout_s)")
        elif state is BODY:
            self._sweep_body(now)

    def _sweep_body(self, now: float) -> None:
        limit, least = self._handler.body_timeout_s, self._handler.intake.limits.min_body_bytes_per_s
        if now - self.since > limit:
            self._time_out(f"body was silent for {limit:g} s (gateway.body_timeout_s)")
        elif self._reader.received < (now - self._began - limit) * least:
            self._time_out(f"body came slower than {least} bytes/s (gateway.min_body_bytes_per_s)")

    def _time_out(self, what: str) -> None:
        self._refuse(RequestTimeoutError(f"The request's {what}."))

    def abort(self) -> None:
        """End the connection within an answer, so that the client knows that it is not whole. The call is
        not told."""
        self.call = None
        self._leave()
        self.transport.abort()

    def _finish(self) -> None:
        """An answer has ended."""
        self.since = monotonic()
        self._reader.held.release()
        if self.state is DRAINING:
            self._began = self.since
            self._unsent = self.transport.get_write_buffer_size()
            self._reader.drop()
            self.flow.release(BACKLOG)
            if self.transport.is_closing():
                pass
            elif self.transport.can_write_eof():
                self.transport.write_eof()
            elif not self._refused:  # with TLS nothing else tells the client that this is the end
                self._close()
        elif self._overloaded is not None:
            self._refuse(self._overloaded)
        elif self._reader.data:
            self._advance()

    def _close(self) -> None:
        """End the connection once what was written is sent."""
        self.state = CLIENT[self.state][ClientEvent.CLOSING]
        self.since = monotonic()
        self._unsent = self.transport.get_write_buffer_size()
        self._reader.drop()
        self.transport.close()

    def _leave(self) -> None:
        """It is cut."""
        self.state = CLIENT[self.state][ClientEvent.GONE]
        self._reader.drop()
        if self.call is not None:
            call, self.call = self.call, None
            call.abandon()
