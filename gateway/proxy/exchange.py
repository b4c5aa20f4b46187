"""One request on its way: what the hops decide, the attempts at answering it, and how it went.

It is the ``Call`` of its client. The hops run one after the other without waiting; what an engine sends is
then read and handed to the client part by part, as it comes. Where something has to be waited for (a
connection, a replica, a provider) a task does that and goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import re
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from gateway.errors import (
    ClientGoneError,
    GatewayError,
    NoReplicaError,
    ShuttingDownError,
    UnexpectedError,
    UpstreamError,
    UpstreamTimeoutError,
)
from gateway.identity import Caller
from gateway.proxy.body import EMPTY, Body
from gateway.proxy.endpoints import Endpoint
from gateway.routing.pools import Replica
from gateway.routing.router import Route
from gateway.telemetry.logs import EVENTS
from gateway.upstream.options import WHOLE, OutputOptions
from gateway.upstream.readers import Reader, TappedReader
from gateway.wire.client import STATUS_LINES, ClientConnection
from gateway.wire.heads import RequestHead

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from gateway.proxy.plane import DataPlane, Snapshot

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_ID_PREFIX = os.urandom(10).hex()
_ids = itertools.count()
_LOOK_AGAIN_S = 0.25
"""How often a waiting request looks for a replica that nobody told it of: one that has started."""


class Attempt(Protocol):
    """One try at getting the answer, of one replica. ``over``: it has come to its end, whole or not."""

    replica: Replica
    over: bool

    def cancel(self) -> None:
        """Stop it. Safe at any time and twice."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class Exchange:
    """A request, the decisions on it, and its answer. Times are seconds of the plane's clock."""

    body: Body = EMPTY
    model = ""
    """As the client named it."""
    # what the hops decide
    options: OutputOptions = WHOLE
    caller: Caller | None = None
    route: Route | None = None
    reader: Reader | None = None
    tapped: TappedReader | None = None
    """The reader, when it listens."""
    # how it goes
    winner: Attempt | None = None
    """The attempt whose answer the client gets."""
    raced = False
    """A second attempt would be made if the first is slow: how long it takes is kept for later requests."""
    hedged = False
    """It has been made."""
    escalated: str | None = None
    """The check that a cheaper variant's answer failed, which nobody got."""
    spent: Sequence[tuple[Route, int, int]] = ()
    """Routes of answers that nobody got, with their prompt and completion tokens."""
    task: asyncio.Task[None] | None = None
    span: Span | None = None
    """Where the process has a tracer provider."""
    tries = 0
    """Attempts that never reached an engine, and those of them over a connection that had been closed."""
    stale = 0
    begun = False
    """Part of an answer has been sent: from here on nothing is retried and no status can change."""
    finished = False
    error: GatewayError | None = None
    paused_at: float | None = None
    first_at: float | None = None
    last_at = 0.0
    gaps: list[float] | None = None
    overhead_s = 0.0
    """Seconds of our own work so far."""

    def __init__(
        self,
        plane: DataPlane,
        snapshot: Snapshot,
        client: ClientConnection,
        endpoint: Endpoint,
        head: RequestHead,
        raw: bytes,
    ) -> None:
        self.plane = plane
        self.snapshot = snapshot
        self.client = client
        self.endpoint = endpoint
        self.head = head
        self.raw = raw
        self.received = self.heard_at = plane.clock()
        """``heard_at``: when the present attempt was made, or the engine was heard of last."""
        self.request_id = request_id(head.headers)
        self.sample_id = new_id()
        """Unlike the request's id never of the client's choosing."""
        self.attempts: list[Attempt] = []

    # going

    def start(self) -> None:
        """Run the hops."""
        try:
            for hop in self.snapshot.before:
                hop(self)
            self.go_on()
        except GatewayError as error:
            self.fail(error)
        except Exception as error:
            self._defect(error)
        self.overhead_s += self.plane.clock() - self.received

    def go_on(self) -> None:
        """Choose a route and ask there; what provably never reached an engine comes here again."""
        try:
            self._onward()
        except NoReplicaError as error:
            wait_s = self._patience()
            if wait_s <= 0 or not error.may_wait:
                raise
            self.spawn(self._wait_for_replica(self.plane.clock() + wait_s))

    def carry_on(self) -> None:
        """Go on after an attempt that never reached an engine."""
        try:
            self.go_on()
        except GatewayError as error:
            self.fail(error)
        except Exception as error:
            self._defect(error)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do what has to be waited for. There is one such task at a time."""
        self.task = asyncio.get_running_loop().create_task(self._guarded(work))

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except GatewayError as error:
            self.fail(error)
        except Exception as error:
            self._defect(error)

    async def _wait_for_replica(self, until: float) -> None:
        """A pool that starts or is full is waited for, as long as the role allows: whoever came first is
        tried first when a request ends, and everybody from time to time."""
        woken = self.plane.waiting[self] = asyncio.Event()
        try:
            while (left := until - self.plane.clock()) > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left, _LOOK_AGAIN_S)):
                        await woken.wait()
                woken.clear()
                with contextlib.suppress(NoReplicaError):
                    self._onward()
                    return
            self._onward()
        finally:
            self.plane.waiting.pop(self, None)

    def _onward(self) -> None:
        for hop in self.snapshot.onward:
            hop(self)

    def _patience(self) -> float:
        role = self.caller.role if self.caller else None
        return self.snapshot.config.roles[role].wait_s if role else 0.0

    # what attempts report

    def whole(self, attempt: Attempt, body: bytes) -> None:
        """All of an answer that is not streamed, of whichever attempt is first."""
        now = self.plane.clock()
        if self.finished:
            return
        self.winner = attempt
        if self.raced:
            self._choose(attempt)
        try:
            assert self.reader
            out = self.reader.feed(body, now)
            breaker = attempt.replica.breaker
            if not breaker.no_failures:
                breaker.answered()
            if self.snapshot.ask.may_escalate(self):
                self.overhead_s += self.plane.clock() - now
                self.spawn(self._send_or_escalate(attempt, out))
                return
            self.overhead_s += self.plane.clock() - now
            self._send_whole(out)
        except GatewayError as error:
            self.fail(error)
        except Exception as error:
            self._defect(error)

    async def _send_or_escalate(self, attempt: Attempt, out: bytes) -> None:
        """The answer is looked at before the client gets it."""
        if not await self.snapshot.ask.escalate(self, attempt):
            self._send_whole(out)

    def _send_whole(self, out: bytes) -> None:
        self.begun = True
        self.client.send_whole(self.answer_head(200, b"application/json"), out)
        self._finish()

    def arrived(self, attempt: Attempt, payload: bytes) -> None:
        """A part of a stream, of whichever attempt is first."""
        now = self.plane.clock()
        if self.finished:
            attempt.cancel()
            return
        self.heard_at = now
        if self.winner is not attempt:
            self.winner = attempt
            if self.raced:
                self._choose(attempt)
        try:
            assert self.reader
            out = self.reader.feed(payload, now)
            if out:
                if self.gaps is None:
                    self.first_at = now
                    self.gaps = []
                else:
                    self.gaps.append(now - self.last_at)
                self.last_at = now
                if self.begun and not self.client.old:
                    self.client.transport.write(b"%x\r\n%b\r\n" % (len(out), out))
                elif self.begun:
                    self.client.send(out)
                else:
                    self.begun = True
                    self.client.begin(self.plane.stream_head(self), out)
        except GatewayError as error:
            self.fail(error)
        except Exception as error:
            self._defect(error)
        self.overhead_s += self.plane.clock() - now

    def _choose(self, attempt: Attempt) -> None:
        """Of hedged attempts the first that answers; how long that took is kept for later ones."""
        if self.hedged:
            for other in self.attempts:
                if other is not attempt:
                    other.cancel()
            self.attempts = [attempt]
        self.plane.first_answer(self, attempt)

    def ended(self, attempt: Attempt) -> None:
        """The last byte of a stream has come."""
        if self.finished:
            return
        if self.reader and self.reader.done:
            attempt.replica.breaker.answered()
            if not self.begun:
                self.client.begin(self.plane.stream_head(self), b"")
            self.client.end()
            self._finish()
        else:
            attempt.replica.breaker.answer_broke()
            self.fail(UpstreamError("The engine ended its answer before it was complete."))

    def broke(self, attempt: Attempt, error: UpstreamError) -> None:
        """An attempt failed: that of a hedged pair is left to the other one."""
        if attempt in self.attempts:
            self.attempts.remove(attempt)
        if not self.finished and not self.attempts:
            self.fail(error)

    # what the client reports

    def abandon(self) -> None:
        self.fail(ClientGoneError("The client closed the connection."))

    def pause(self) -> None:
        self.paused_at = self.plane.clock()
        for attempt in self.attempts:
            attempt.pause()

    def resume(self) -> None:
        self.paused_at = None
        self.heard_at = self.plane.clock()
        for attempt in self.attempts:
            attempt.resume()

    def sweep(self, now: float) -> None:
        """Called from time to time: end what takes too long."""
        limits = self.snapshot.config.gateway
        if now - self.received > limits.total_timeout_s:
            self._time_out(f"The answer took longer than {limits.total_timeout_s:g} s.")
        elif self.paused_at is not None:
            if now - self.paused_at > limits.idle_timeout_s:
                self.fail(ClientGoneError("The client does not read its answer."))
        elif self.begun:
            if now - self.heard_at > limits.idle_timeout_s:
                self._time_out(f"The engine fell silent for {limits.idle_timeout_s:g} s.")
        elif self.attempts and now - self.heard_at > limits.first_byte_timeout_s:
            self._time_out(f"The engine gave no answer within {limits.first_byte_timeout_s:g} s.")

    def _time_out(self, message: str) -> None:
        for attempt in self.attempts:
            attempt.replica.breaker.answer_broke()
        names = ", ".join(f"{a.replica.name} at {a.replica.url}" for a in self.attempts)
        self.fail(UpstreamTimeoutError(message, internal=names))

    # ending

    def stop(self) -> None:
        """The gateway stops and will wait no longer."""
        self.fail(ShuttingDownError("The gateway is shutting down; try again."))

    def fail(self, error: GatewayError) -> None:
        """Tell the client, in whatever way is still open: a status, or the last event of a stream."""
        if self.finished:
            return
        self.error = error
        gone = isinstance(error, ClientGoneError)
        if self.begun and not gone:
            self.client.end(self.endpoint.error_event(error))
        elif not gone:
            head = self.answer_head(error.status, b"application/json")
            if error.retry_after_s is not None:
                head += b"retry-after: %d\r\n" % error.retry_after_s
            if error.status == 401:
                head += b"www-authenticate: Bearer\r\n"
            self.client.send_whole(head, self.endpoint.error_body(error))
        elif self.paused_at is not None:
            self.client.abort()
        self._finish()

    def answer_head(self, status: int, content_type: bytes) -> bytes:
        placed = self.plane.placed(self.route) if self.route else b""
        return b"%b%bcontent-type: %b\r\nx-request-id: %b\r\n%b" % (
            STATUS_LINES.get(status) or b"HTTP/1.1 %d Error\r\n" % status,
            self.plane.date(),
            content_type,
            self.request_id.encode(),
            placed,
        )

    def _defect(self, error: Exception) -> None:
        fields = {"request_id": self.request_id}
        logging.getLogger(EVENTS).error("request failed", exc_info=error, extra={"fields": fields})
        self.fail(UnexpectedError(repr(error)))

    def _finish(self) -> None:
        self.finished = True
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()
        for attempt in self.attempts:
            if not attempt.over:
                attempt.cancel()
        self.plane.finished(self)
        # They know this exchange: as a ring, all of it would be left to the garbage collector.
        self.attempts = []
        self.winner = None


def request_id(headers: dict[str, str]) -> str:
    """The client's id if it is fit for a header and a log line, else a new one of 32 characters."""
    given = headers.get("x-request-id")
    if given is not None and _SANE_REQUEST_ID.fullmatch(given):
        return given
    return new_id()


def new_id() -> str:
    """One that no other request of this machine has."""
    return f"{_ID_PREFIX}{next(_ids):012x}"
