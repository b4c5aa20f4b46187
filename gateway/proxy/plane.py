"""The data plane: every connection, every request under way, and what they share.

The configuration's part of it is a ``Snapshot``. A new one replaces the old one whole; requests under way
keep the one that they began with.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import formatdate

from starlette.types import ASGIApp

from gateway.config import Config
from gateway.errors import GatewayError, MethodNotAllowedError
from gateway.proxy.endpoints import ANY, ENDPOINTS
from gateway.proxy.exchange import Attempt, Exchange, request_id
from gateway.proxy.hops import AskUpstream, Hop
from gateway.quality.observe import Observed, Observer
from gateway.routing.breaker import Clock
from gateway.routing.pools import Pools
from gateway.routing.router import Route, Router
from gateway.telemetry.latencies import Latencies
from gateway.telemetry.ledger import Ledger
from gateway.telemetry.logs import EVENTS, AccessLog
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.traces import traces
from gateway.wire.asgi import AsgiCall
from gateway.wire.client import STATUS_LINES, Call, ClientConnection
from gateway.wire.heads import RequestHead
from quantize.card import Card

LONGEST_TICK_S = 0.25
WOKEN = 4
"""Waiting requests that try again when one ends: more than one, since it may be of another pool."""
_STREAM = b"text/event-stream; charset=utf-8"
_UNBUFFERED = b"cache-control: no-cache\r\nx-accel-buffering: no\r\n"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the configuration decides. ``before`` runs once per request, ``onward`` again when a request
    has to go elsewhere."""

    config: Config
    cards: Mapping[str, Card]
    pools: Pools
    router: Router
    before: Sequence[Hop]
    onward: Sequence[Hop]
    ask: AskUpstream
    observer: Observer
    known_models: frozenset[str]
    model: str
    """As engines know it."""


class DataPlane:
    """The doorman of all clients."""

    def __init__(self, snapshot: Snapshot, metrics: Metrics, latencies: Latencies, clock: Clock) -> None:
        self.snapshot = snapshot
        self.clock = clock
        self.app: ASGIApp | None = None
        """What answers everything that is not on the hot path."""
        self.metrics = metrics
        self.latencies = latencies
        self.log = AccessLog()
        self.clients: set[ClientConnection] = set()
        self.active: set[Exchange] = set()
        self.waiting: dict[Exchange, asyncio.Event] = {}
        """Requests that wait for a replica, the first that came first."""
        self.stopping = False
        self.ledger = Ledger(metrics, self.log)
        self._traces = traces()
        self._placed: dict[tuple[str, str, str], bytes] = {}
        self._date = b""
        self._date_at = -1

    # the doorman

    @property
    def max_body_bytes(self) -> int:
        return self.snapshot.config.gateway.max_body_bytes

    @property
    def header_timeout_s(self) -> float:
        return self.snapshot.config.gateway.header_timeout_s

    @property
    def body_timeout_s(self) -> float:
        return self.snapshot.config.gateway.body_timeout_s

    @property
    def keep_alive_s(self) -> float:
        return self.snapshot.config.gateway.keep_alive_s

    def serve(self, client: ClientConnection, head: RequestHead, body: bytes) -> Call | None:
        endpoint = ENDPOINTS.get(head.path)
        if endpoint is None:
            assert self.app is not None
            return AsgiCall(self.app, client, head, body, self.date)
        if head.method != "POST":
            error = MethodNotAllowedError(f"{head.method[:20]} {head.path}: this endpoint takes POST only.")
            self.refuse(client, error, head, b"allow: POST\r\n")
            return None
        exchange = Exchange(self, self.snapshot, client, endpoint, head, body)
        self.active.add(exchange)
        if self._traces is not None:
            exchange.span = self._traces.begin(head.path, head.headers)
        exchange.start()
        return None if exchange.finished else exchange

    def refuse(
        self, client: ClientConnection, error: GatewayError, head: RequestHead | None, more: bytes = b""
    ) -> None:
        endpoint = ENDPOINTS.get(head.path, ANY) if head else ANY
        self.metrics.requests.labels("other", "other", "none", str(error.status)).inc()
        identity = request_id(head.headers if head else {}).encode()
        status_line = STATUS_LINES.get(error.status) or b"HTTP/1.1 %d Error\r\n" % error.status
        client.send_whole(
            b"%b%bcontent-type: application/json\r\nx-request-id: %b\r\n%b"
            % (status_line, self.date(), identity, more),
            endpoint.error_body(error),
        )

    # what exchanges need

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(seconds, call)

    def date(self) -> bytes:
        """The header line of the present second."""
        now = int(time.time())
        if now != self._date_at:
            self._date_at = now
            self._date = b"date: " + formatdate(now, usegmt=True).encode() + b"\r\n"
        return self._date

    def placed(self, route: Route) -> bytes:
        """The header lines that say where a request went, and why."""
        key = (route.variant, route.replica.name, route.reason)
        lines = self._placed.get(key)
        if lines is None:
            text = (
                f"x-tiercel-variant: {route.variant}\r\nx-tiercel-replica: {route.replica.name}\r\n"
                f"x-tiercel-route-reason: {route.reason}\r\n"
            )
            lines = self._placed[key] = text.encode("latin-1", "replace")
        return lines

    def stream_head(self, exchange: Exchange) -> bytes:
        return exchange.answer_head(200, _STREAM) + _UNBUFFERED

    def first_answer(self, exchange: Exchange, attempt: Attempt) -> None:
        """An attempt's answer has begun to come, before any other's."""
        route = exchange.route
        assert route is not None
        self.latencies.add(route.role, route.variant, self.clock() - exchange.received)
        if exchange.hedged:
            winner = "first" if attempt.replica is route.replica else "second"
            self.metrics.hedges.labels(route.role, route.variant, winner).inc()

    def finished(self, exchange: Exchange) -> None:
        """An exchange has ended, one way or the other."""
        self.active.discard(exchange)
        if self.waiting:
            for woken in itertools.islice(self.waiting.values(), WOKEN):
                woken.set()
        self.ledger.record(exchange)
        if exchange.span is not None and self._traces is not None:
            self._traces.end(exchange.span, exchange)
        if exchange.tapped is not None and exchange.error is None:
            self.observe(exchange)

    def observe(self, exchange: Exchange) -> None:
        """Have an answer checked that was listened to."""
        tapped, route = exchange.tapped, exchange.route
        if tapped is None or route is None:
            return
        observer = exchange.snapshot.observer
        if tapped.confused:
            observer.count_error("listen", route.role, route.variant)
            return
        first, gaps = exchange.first_at, exchange.gaps
        observer.offer(
            Observed(
                route.role,
                route.variant,
                exchange.request_id,
                exchange.endpoint.path,
                exchange.raw,
                tapped.answer,
                None if first is None else first - exchange.received,
                sum(gaps) / len(gaps) if gaps else None,
                exchange.caller.cache_salt if exchange.caller else "",
                exchange.sample_id,
            )
        )

    # from time to time

    async def sweep_forever(self) -> None:
        """End what takes too long, and write the log."""
        while True:
            limits = self.snapshot.config.gateway
            shortest = min(
                limits.first_byte_timeout_s,
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
            exchange.sweep(now)
        for client in tuple(self.clients):
            client.sweep(time.monotonic())
        for replica in self.snapshot.pools.replicas():
            replica.connections.sweep()
        self.log.flush()

    async def close(self) -> None:
        """The server has waited for requests as long as it would."""
        self.stopping = True
        for exchange in tuple(self.active):
            exchange.stop()
        for replica in self.snapshot.pools.replicas():
            replica.connections.close()
        self.log.flush()
