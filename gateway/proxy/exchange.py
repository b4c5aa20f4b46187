"""One request on its way: what came, what was decided about it, and how it goes.

An exchange is data. The hops decide, ``attempts.py`` asks engines, ``reply.py`` answers the client, and
``pipeline.py`` moves it from one to the next. It is the ``Call`` of its client's connection, whose events it
hands to its pipeline.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
from collections.abc import Callable
from typing import Any, Protocol

from gateway.errors import GatewayError
from gateway.identity import Caller
from gateway.proxy.body import EMPTY, Body
from gateway.proxy.endpoints import Endpoint
from gateway.proxy.record import Spent
from gateway.routing.replicas import Replica
from gateway.routing.router import Route
from gateway.upstream.options import WHOLE, OutputOptions
from gateway.upstream.readers import Reader, TappedReader
from gateway.wire.client import ClientConnection
from gateway.wire.heads import RequestHead
from gateway.wire.requests import Received

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_ID_PREFIX = os.urandom(10).hex()
_ids = itertools.count()


class Attempt(Protocol):
    """One try at getting the answer, of one replica."""

    exchange: Exchange
    replica: Replica
    over: bool
    """It has come to its end, whole or not."""
    sent: bool
    """The request has left for the replica: from here on it may have done work."""
    did_nothing: bool
    """It provably did no work, or its replica says so: by an answer other than 200."""

    def request_body(self) -> tuple[bytes | memoryview, ...] | None:
        """As an engine got it, in parts; None of what no engine was sent."""

    def start(self) -> None: ...

    def cancel(self) -> None:
        """Stop it. Safe at any time and twice."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class Follower(Protocol):
    """Follows an answer, and may change it."""

    def around(self, reader: Reader, *, stream: bool) -> Reader:
        """Reads it with ``reader``."""


class Driver(Protocol):
    """What moves an exchange: its pipeline."""

    def client_left(self, exchange: Exchange) -> None: ...

    def client_paused(self, exchange: Exchange) -> None:
        """The client reads slower than we send."""

    def client_resumed(self, exchange: Exchange) -> None: ...

    def sweep(self, exchange: Exchange, now: float) -> None:
        """Called from time to time: end what takes too long, by the limits that it began with."""

    def fail(self, exchange: Exchange, error: GatewayError) -> None:
        """End it with an error, in whatever way is still open."""

    def defect(self, exchange: Exchange, error: Exception) -> None:
        """End it after an exception that nobody expected."""

    def finish(self, exchange: Exchange) -> None:
        """Its answer has been sent."""


class Exchange:
    """A request, the decisions on it, and its answer. Times are seconds of the gateway's clock."""

    __slots__ = (
        "attempts",
        "begun",
        "body",
        "caller",
        "carried",
        "client",
        "endpoint",
        "error",
        "escalated",
        "finished",
        "first_at",
        "follower",
        "gaps",
        "head",
        "heard_at",
        "hedged",
        "last_at",
        "model",
        "names_model",
        "number",
        "options",
        "overhead_s",
        "owing",
        "paused_at",
        "pipeline",
        "raw",
        "reader",
        "received",
        "request_id",
        "route",
        "span",
        "spare",
        "spent",
        "tapped",
        "task",
        "tries",
        "winner",
        "won",
    )

    def __init__(
        self,
        pipeline: Driver,
        client: ClientConnection,
        endpoint: Endpoint,
        head: RequestHead,
        raw: Received,
        now: float,
    ) -> None:
        self.pipeline, self.client, self.endpoint = pipeline, client, endpoint
        self.head, self.raw = head, raw
        self.received = self.heard_at = now
        """``heard_at``: when the present attempt was made, or its engine was heard of last."""
        number = self.number = next(_ids)
        given = head.headers.get("x-request-id")
        self.request_id = f"{_ID_PREFIX}{number:012x}" if given is None else request_id(given, number)
        self.attempts: list[Attempt] = []
        # what the hops decide
        self.body: Body = EMPTY
        self.model = ""  # as the client named it
        self.names_model = True
        """False: the body names none, and the engine takes the one that it has."""
        self.options: OutputOptions = WHOLE
        self.caller: Caller | None = None
        self.route: Route | None = None
        """Of a hedged request, from the first part of an answer on: that of the winner."""
        self.reader: Reader | None = None
        self.follower: Follower | None = None
        """Of an answer that is kept."""
        self.tapped: TappedReader | None = None
        """The reader, when the answer is listened to."""
        # how it goes
        self.winner: Attempt | None = None
        """The attempt whose answer the client gets."""
        self.hedged = False
        """A second attempt has been made because the first was slow."""
        self.won: str | None = None
        """Of a hedged request: ``first`` or ``second``."""
        self.carried = b""  # header lines that the engine's answer brings along for the client
        self.escalated: str | None = None
        """The check that a cheaper variant's answer failed, which nobody got."""
        self.spare: Callable[[], None] | None = None  # sends that answer after all
        self.spent: tuple[Spent, ...] = ()
        """Answers that nobody got."""
        self.owing: tuple[Attempt, ...] = ()
        """Attempts that are over, may have done work, and had no usage or no final one."""
        self.task: asyncio.Task[None] | None = None
        """What is being waited for: a connection, a replica, a provider."""
        self.span: Any = None
        """OpenTelemetry's, where the process has a tracer provider."""
        self.tries = 0  # attempts that did no work
        self.begun = False
        """Part of an answer has been sent: from here on nothing is tried again and no status can change."""
        self.finished = False
        self.error: GatewayError | None = None
        self.paused_at: float | None = None
        self.first_at: float | None = None
        self.last_at = 0.0
        self.gaps: list[float] | None = None  # seconds between the parts of a stream
        self.overhead_s = 0.0  # seconds of our own work so far

    @property
    def sample_id(self) -> str:
        """What samples are drawn by: an id that no client chooses."""
        return own_id(self.number)

    def read_with(self, reader: Reader, *, stream: bool) -> None:
        """The answer, streamed or not, is read by ``reader`` from its beginning."""
        self.reader = reader
        self.tapped = reader if isinstance(reader, TappedReader) else None
        if self.follower is not None:
            self.reader = self.follower.around(reader, stream=stream)

    def pause(self) -> None:
        self.pipeline.client_paused(self)

    def resume(self) -> None:
        self.pipeline.client_resumed(self)

    def abandon(self) -> None:
        self.pipeline.client_left(self)


def own_id(number: int | None = None) -> str:
    """An id of 32 characters that no other request has."""
    return f"{_ID_PREFIX}{next(_ids) if number is None else number:012x}"


def request_id(given: str | None, number: int | None = None) -> str:
    """The client's id if it is fit for a header and a log line, else one of our own."""
    if given is not None and _SANE_REQUEST_ID.fullmatch(given):
        return given
    return own_id(number)
