"""The data plane: every connection, every request under way, and what they share.

The configuration's part of it is a ``Snapshot``. A new one replaces the old one whole; requests under way
keep the pipeline that they began with.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.types import ASGIApp

from gateway.config import Config
from gateway.errors import GatewayError, ShuttingDownError
from gateway.proxy.endpoints import ANY, errors_of
from gateway.proxy.exchange import Exchange, request_id
from gateway.proxy.hops import Admit
from gateway.proxy.pipeline import Pipeline
from gateway.proxy.reply import Reply
from gateway.proxy.waiting import WaitingLines
from gateway.quality.observe import Observer
from gateway.routing.breaker import Clock
from gateway.routing.pools import Pools
from gateway.routing.router import Router
from gateway.telemetry.ledger import Ledger
from gateway.telemetry.logs import EVENTS, AccessLog
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.traces import Traces, traces
from gateway.wire.asgi import AsgiCall
from gateway.wire.client import STATUS_LINES, Call, ClientConnection
from gateway.wire.flow import Admission, Intake
from gateway.wire.heads import RequestHead
from gateway.wire.requests import Received
from quantize.card import Card

LONGEST_TICK_S = 0.25


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one configuration makes of a request's way."""

    config: Config
    cards: Mapping[str, Card]
    """Of every served variant, by ``model:variant``."""
    pools: Pools
    router: Router
    admit: Admit
    pipeline: Pipeline
    observer: Observer


class DataPlane:
    """What stands behind all client connections: their ``RequestHandler``."""

    def __init__(self, metrics: Metrics, clock: Clock, log: AccessLog | None = None) -> None:
        self.snapshot: Snapshot
        self.clock = clock
        self.app: ASGIApp | None = None
        """What answers everything that is not on the hot path."""
        self.metrics = metrics
        self.log = log or AccessLog()
        self.ledger = Ledger(metrics, self.log)
        self.traces: Traces | None = traces()
        self.reply = Reply()
        self.lines = WaitingLines(clock)
        self.intake = Intake(lambda: self.snapshot.config.gateway)
        self.clients: set[ClientConnection] = set()
        self.active: set[Exchange] = set()
        self.stopping = False

    # the RequestHandler of client connections

    @property
    def header_timeout_s(self) -> float:
        return self.snapshot.config.gateway.header_timeout_s

    @property
    def body_timeout_s(self) -> float:
        return self.snapshot.config.gateway.body_timeout_s

    @property
    def keep_alive_s(self) -> float:
        return self.snapshot.config.gateway.keep_alive_s

    def admit(self, head: RequestHead) -> Admission:
        """Whether a request may come in, by its head alone. Raises GatewayError."""
        memo = head.memo
        if memo is not None and memo.by is self.snapshot.admit:
            known: Admission = memo.admission
            return known
        return self.snapshot.admit(head).admission

    def serve(self, client: ClientConnection, head: RequestHead, body: Received) -> Call | None:
        snapshot = self.snapshot
        admitted = head.memo
        if admitted is None or admitted.by is not snapshot.admit:
            admitted = snapshot.admit(head)
        endpoint = admitted.endpoint
        if admitted.preflight is not None:
            client.send_whole(admitted.preflight + self.reply.date(), b"")
            return None
        if endpoint is None:
            assert self.app is not None
            assert isinstance(body, bytes)  # PAGE_BODY_BYTES are no large body
            return AsgiCall(self.app, client, head, body, self.reply.date, admitted.more)
        exchange = Exchange(snapshot.pipeline, client, endpoint, head, body, self.clock())
        self.active.add(exchange)
        if self.traces is not None:
            exchange.span = self.traces.begin(head.path, head.headers)
        snapshot.pipeline.start(exchange)
        return None if exchange.finished else exchange

    def refuse(self, client: ClientConnection, error: GatewayError, head: RequestHead | None) -> None:
        endpoint = errors_of(head.path) if head else ANY
        self.metrics.requests.labels("other", "other", "none", "none", str(error.status)).inc()
        identity = request_id(head.headers.get("x-request-id") if head else None).encode()
        line = STATUS_LINES.get(error.status) or b"HTTP/1.1 %d Error\r\n" % error.status
        more = b""
        if error.status == 405:
            more = b"allow: POST\r\n"
        elif error.status == 426:
            more = b"upgrade: HTTP/1.1\r\n"
        elif error.status == 401:
            more = b"www-authenticate: Bearer\r\n"
        if error.retry_after_s is not None:
            more += b"retry-after: %d\r\n" % error.retry_after_s
        if head is not None and (cors := self.snapshot.admit.cors) is not None:
            more += cors.lines(head.path, head.headers)
        client.send_whole(
            b"%b%bcontent-type: application/json\r\n%b%b"
            % (line, self.reply.date(), endpoint.id_lines(identity), more),
            endpoint.error_body(error),
            no_body=head is not None and head.method == "HEAD",
        )

    def ended(self, exchange: Exchange) -> None:
        """An exchange has come to its end: there may be room for one that waits."""
        self.active.discard(exchange)
        if self.lines.lines:
            self.lines.wake()

    # from time to time

    async def sweep_forever(self) -> None:
        """End what takes too long, and write the log."""
        while True:
            limits = self.snapshot.config.gateway
            shortest = min(
                limits.first_byte_timeout_s,
                limits.answer_timeout_s,
                limits.idle_timeout_s,
                limits.header_timeout_s,
                limits.body_timeout_s,
            )
            await asyncio.sleep(min(LONGEST_TICK_S, shortest / 4))
            try:
                self._sweep()
            except Exception:
                logging.getLogger(EVENTS).exception("the sweep failed")

    def _sweep(self) -> None:
        now = self.clock()
        for exchange in tuple(self.active):
            exchange.pipeline.sweep(exchange, now)
        for client in tuple(self.clients):
            client.sweep(time.monotonic())
        for replica in self.snapshot.pools.replicas():
            replica.connections.sweep()
        self.log.flush()

    async def close(self, within_s: float) -> None:
        """The server has waited for requests as long as it would. What was answered is looked at ``within_s``
        seconds, or not at all."""
        self.stopping = True
        for exchange in tuple(self.active):
            error = ShuttingDownError("The gateway is shutting down; try again.")
            exchange.pipeline.fail(exchange, error)
        await self.snapshot.observer.drain(within_s)
        for replica in self.snapshot.pools.replicas():
            replica.connections.close()
        self.log.flush()
