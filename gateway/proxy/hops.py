"""The hops of a request, each one concern. Their order is in ``app.py``; none of these waits."""

from __future__ import annotations

from collections.abc import Awaitable, Container
from typing import Any

import msgspec

from gateway.config import Config
from gateway.errors import BadRequestError, MethodNotAllowedError, NoWebSocketError
from gateway.identity import Identities, Sender, owner_of
from gateway.kept.keeper import Keeper
from gateway.proxy.body import Body
from gateway.proxy.endpoints import INVOCATIONS, Endpoint, Form, endpoint_of
from gateway.proxy.exchange import Attempt, Exchange
from gateway.proxy.large import SMALL_BYTES, LargeReader, quickly_read
from gateway.proxy.record import NO_USAGE, Record, Usage
from gateway.quality.observe import Observed, Observer
from gateway.routing.choices import Reason
from gateway.routing.pace import Paces
from gateway.routing.router import Router
from gateway.telemetry.propagation import PASSED_ON
from gateway.upstream.options import STREAM, OutputOptions
from gateway.upstream.settle import Settlement, Unreported, owes_usage
from gateway.wire.cors import Cors
from gateway.wire.flow import Admission
from gateway.wire.heads import RequestHead

COMPLETIONS = Form.COMPLETIONS
PAGE_BODY_BYTES = 1 << 20
"""What the application is sent at most: orders and configurations, no prompts with images."""


class Admitted(msgspec.Struct, frozen=True, gc=False):
    """What a request's head alone decides. It is kept with the head, for the next request that has it."""

    by: Any
    """The ``Admit`` that decided: another one's decisions do not count."""
    endpoint: Endpoint | None
    """None for what the application answers."""
    sender: Sender | None
    admission: Admission
    more: bytes = b""
    """Header lines of its answers."""
    preflight: bytes | None = None
    """The head of the answer to a browser that asks whether it may send a request."""
    is_json: bool = True
    """Its content-type says so."""
    coding: str = ""
    """Its body's."""
    passes_on: bool = False
    """There are headers that engines are given."""


class Admit:
    """Whether a request may come in at all, by its head: path, method, key, size. Nothing of its body is kept
    before."""

    def __init__(self, config: Config) -> None:
        self._identities = Identities(config)
        self._max_body_bytes = config.gateway.max_body_bytes
        self.cors = Cors(config.gateway.cors_origins) if config.gateway.cors_origins else None

    def __call__(self, head: RequestHead) -> Admitted:
        """Raises MethodNotAllowedError, NoWebSocketError or UnauthenticatedError."""
        memo = head.memo
        if memo is not None and memo.by is self:
            admitted: Admitted = memo
            return admitted
        endpoint = endpoint_of(head.path)
        sender, tenant = None, ""
        preflight = self.cors.preflight(head) if self.cors is not None else None
        if preflight is not None:
            pass  # it has no key, and asks for nothing but whether it may ask
        elif endpoint is not None:
            if head.method != "POST":
                if head.headers.get("upgrade", "").lower() == "websocket":
                    raise NoWebSocketError(f"{head.path[:80]}: is not served over a WebSocket; send a POST.")
                raise MethodNotAllowedError(
                    f"{head.method[:20]} {head.path[:80]}: this endpoint takes POST only."
                )
            sender = self._identities.sender(head.headers)
            tenant = sender.owner
        elif head.length:
            # The application looks at keys itself; a body is kept only for somebody who has one.
            tenant = owner_of(self._identities.key(head.headers))
        more = self.cors.lines(head.path, head.headers) if self.cors is not None else b""
        most = self._max_body_bytes if endpoint is not None else min(PAGE_BODY_BYTES, self._max_body_bytes)
        admission = Admission(tenant, most if preflight is None else 0)
        kind = head.headers.get("content-type", "").partition(";")[0].strip().lower()
        admitted = Admitted(
            self,
            endpoint,
            sender,
            admission,
            more,
            preflight,
            kind == "application/json",
            head.headers.get("content-encoding", ""),
            not head.headers.keys().isdisjoint(PASSED_ON),
        )
        head.memo = admitted
        return admitted


class ReadBody:
    """What is asked: the body, as far as the gateway depends on it. What takes long is read in turns."""

    def __init__(self, large: LargeReader) -> None:
        self._large = large

    def __call__(self, exchange: Exchange) -> Awaitable[None] | None:
        admitted: Admitted = exchange.head.memo
        raw = exchange.raw
        if not admitted.is_json:
            # Also what keeps a web page from posting here unasked: browsers send this type only after a
            # preflight request, which is answered for the origins in `gateway.cors_origins` alone.
            raise BadRequestError(
                "content-type: send the header `content-type: application/json`", param="content-type"
            )
        if (
            admitted.coding
            or not isinstance(raw, bytes)
            or not (len(raw) <= SMALL_BYTES or quickly_read(raw))
        ):
            return self._read(exchange, admitted)
        try:
            body = Body(raw, exchange.endpoint.reads)
        except BadRequestError:
            if len(raw) <= SMALL_BYTES:
                raise
            return self._read(exchange, admitted)  # by its first level alone it may be one
        _ask(exchange, body)
        return None

    async def _read(self, exchange: Exchange, admitted: Admitted) -> None:
        raw, exchange.raw = exchange.raw, b""
        limit, reads = admitted.admission.max_body_bytes, exchange.endpoint.reads
        body = await self._large.read(raw, admitted.coding, limit, reads)
        if admitted.coding:
            exchange.client.grow(body.size)
        _ask(exchange, body)


def _ask(exchange: Exchange, body: Body) -> None:
    exchange.body = body
    endpoint, fields = exchange.endpoint, body.fields
    if endpoint is INVOCATIONS:
        endpoint = exchange.endpoint = endpoint.of(body)
    exchange.model = fields.model
    if endpoint.form is COMPLETIONS:
        exchange.options = OutputOptions.of(fields, chat=endpoint.chat, body=body)
    elif endpoint.form is not Form.PLAIN and fields.stream:
        exchange.options = STREAM


class Identify:
    """Who asks: the role and the session, by what the head has said and by the body."""

    def __call__(self, exchange: Exchange) -> None:
        sender: Sender = exchange.head.memo.sender
        fields = exchange.body.fields
        exchange.caller = caller = sender.caller(fields)
        if not fields.model:  # who names none gets what its role does
            exchange.model = fields.model = caller.role
            exchange.names_model = False


class ChooseRoute:
    """Which precision, which replica, and why: before every attempt."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def __call__(self, exchange: Exchange) -> None:
        assert exchange.caller
        exchange.route = self._router.route(exchange.caller, exchange.body, exchange.endpoint)


class Settle:
    """Has it counted what engines began and gave no final usage of, and asks for what they took in."""

    def __init__(self, settlement: Settlement) -> None:
        self._settlement = settlement

    def __call__(self, record: Record, exchange: Exchange) -> None:
        if not exchange.owing and (record.usage.exact or not exchange.attempts):
            return
        for attempt in (*exchange.owing, *exchange.attempts):
            won = attempt is exchange.winner
            if attempt.sent and not attempt.did_nothing and not (won and record.usage.exact):
                self._report(record, exchange, attempt, record.usage if won else NO_USAGE)

    def _report(self, record: Record, exchange: Exchange, attempt: Attempt, usage: Usage) -> None:
        path, replica = exchange.endpoint.engine_path, attempt.replica
        if record.role is None or not owes_usage(path):
            return
        body = attempt.request_body()
        self._settlement.report(
            Unreported(
                record.role,
                replica.labels,
                record.key,
                replica.base,
                path,
                body,
                usage,
                replica.credentials,
            )
        )


class Pace:
    """Learns how soon a pool answers, for roles that have a target."""

    def __init__(self, paces: Paces) -> None:
        self._paces = paces

    def __call__(self, record: Record, exchange: Exchange) -> None:
        tokens, route = record.usage.completion, exchange.route
        if record.status != 200 or route is None or record.role is None or exchange.tries:
            return
        if record.hedged or record.spent:
            return
        seconds = record.duration_s
        if record.first_token_s is not None:  # its own time is known, and the first token comes with it
            tokens, seconds = tokens - 1, seconds - record.first_token_s
        if tokens > 0:
            load = route.replica.in_flight + 1  # this one has just left
            self._paces.answered(route.variant, record.role, tokens, seconds, load)


class Keep:
    """Has a sample of what roles are asked kept, where they have agreed to it: of what was answered, and not
    of what named a variant, an adapter or a provider's model, which is nobody's choice but the client's."""

    def __init__(self, keeper: Keeper, adapters: Container[str]) -> None:
        self._keeper = keeper
        self._adapters = adapters

    def __call__(self, record: Record, exchange: Exchange) -> None:
        route, endpoint = exchange.route, exchange.endpoint
        if exchange.error is not None or route is None or endpoint.form is Form.PLAIN or record.status != 200:
            return
        if route.reason in (Reason.EXPLICIT_VARIANT, Reason.PROVIDER) or exchange.model in self._adapters:
            return
        self._keeper.offer(
            route.role, route.variant, exchange.sample_id, exchange.body.json, chat=endpoint.chat
        )


class Observe:
    """Has answers checked that were listened to."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def __call__(self, record: Record, exchange: Exchange) -> None:
        if exchange.tapped is not None and exchange.error is None:
            self.offer(exchange)

    def offer(self, exchange: Exchange) -> None:
        """Also an answer that nobody got."""
        tapped, route = exchange.tapped, exchange.route
        if tapped is None or route is None:
            return
        if tapped.confused:
            self._observer.count_error("listen", route.role, route.replica.labels)
            return
        first, gaps = exchange.first_at, exchange.gaps
        self._observer.offer(
            Observed(
                route.role,
                route.variant,
                exchange.request_id,
                exchange.endpoint.path,
                exchange.body.json,
                tapped.answer,
                None if first is None else first - exchange.received,
                sum(gaps) / len(gaps) if gaps else None,
                exchange.caller.cache_salt if exchange.caller else "",
                exchange.sample_id,
                exchange.model,
            )
        )
