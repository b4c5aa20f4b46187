"""POST /v1/chat/completions and /v1/completions: the hot path, plain ASGI.

While the hops work, the client is watched: when it leaves, they are cancelled, and with them the
generation upstream, be it queued, in prefill or in the middle of its answer.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence

from starlette.types import Receive, Scope, Send

from gateway.api.body import parse_body, read_body
from gateway.errors import ClientGoneError, GatewayError, ShuttingDownError, UnexpectedError, envelope
from gateway.exchange import Exchange
from gateway.quality.observe import Observer
from gateway.routing.breaker import Clock
from gateway.telemetry.ledger import Ledger
from gateway.telemetry.logs import EVENTS

Hop = Callable[[Exchange], Awaitable[None]]


class Completions:
    """The endpoint. ``hops`` run in order, each on the exchange."""

    def __init__(
        self, hops: Sequence[Hop], ledger: Ledger, observer: Observer, max_body_bytes: int, clock: Clock
    ) -> None:
        self._hops = tuple(hops)
        self._ledger = ledger
        self._observer = observer
        self._max_body_bytes = max_body_bytes
        self._clock = clock
        self._log = logging.getLogger(EVENTS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, send, self._clock)
        async with exchange.on_close:
            try:
                await self._serve(exchange, receive)
            except GatewayError as error:
                await self._fail(exchange, error)
            except asyncio.CancelledError:  # by the server, when requests outlast its shutdown
                await self._fail(exchange, ShuttingDownError("The gateway is shutting down; try again."))
            except Exception as error:
                self._log.exception("request failed", extra={"fields": {"request_id": exchange.request_id}})
                await self._fail(exchange, UnexpectedError(repr(error)))
        if exchange.error is None and exchange.tapped and exchange.caller and exchange.route:
            await self._observer.observe(
                exchange.caller.role, exchange.route.variant, exchange.body, exchange.answer
            )

    async def _serve(self, exchange: Exchange, receive: Receive) -> None:
        raw = await read_body(receive, exchange.headers, self._max_body_bytes)
        exchange.received = self._clock()
        exchange.body = parse_body(raw, chat=exchange.chat)
        await self._while_client_listens(exchange, receive)

    async def _while_client_listens(self, exchange: Exchange, receive: Receive) -> None:
        work = asyncio.ensure_future(self._walk(exchange))
        away = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((work, away), return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and exchange.complete:
                await asyncio.wait((work,))  # everything is sent: what is left is our own bookkeeping
            if not work.done():
                raise ClientGoneError("The client closed the connection.")
            work.result()
        finally:
            work.cancel()
            away.cancel()
            await asyncio.gather(work, away, return_exceptions=True)

    async def _walk(self, exchange: Exchange) -> None:
        for hop in self._hops:
            await hop(exchange)
        self._ledger.record(exchange)  # at once, so that the books are never behind what clients have

    async def _fail(self, exchange: Exchange, error: GatewayError) -> None:
        """Tell the client, in whatever way is still open: a status, or the last event of a stream."""
        exchange.error = error
        self._ledger.record(exchange)
        if exchange.complete or isinstance(error, ClientGoneError):
            return
        body = json.dumps(envelope(error)).encode()
        if exchange.begun:
            await exchange.send({"type": "http.response.body", "body": b"data: " + body + b"\n\n"})
            return
        headers = exchange.answer_headers("application/json")
        headers.append((b"content-length", str(len(body)).encode()))
        if error.retry_after_s is not None:
            headers.append((b"retry-after", str(error.retry_after_s).encode()))
        await exchange.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await exchange.send({"type": "http.response.body", "body": body})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
