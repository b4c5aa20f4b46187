"""The hops of a request, each one concern. Their order is in ``app.py``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from gateway.config import Config
from gateway.errors import NeverReachedError, UpstreamError, UpstreamRefusedError
from gateway.exchange import Exchange
from gateway.identity import identify
from gateway.quality.observe import Observer
from gateway.routing.pools import PROVIDER, Replica
from gateway.routing.router import Router
from gateway.upstream.base import Call, Event, Reply, Upstream
from gateway.upstream.wishes import Wishes, as_wished, for_engine, with_usage

MOST_ATTEMPTS = 4
"""Replicas tried for one request at most, when connecting to each fails."""


class Identify:
    """Who asks."""

    def __init__(self, config: Config) -> None:
        self._config = config

    async def __call__(self, exchange: Exchange) -> None:
        exchange.caller = identify(self._config, exchange.headers, exchange.body)
        exchange.wishes = Wishes.of(exchange.body, chat=exchange.chat)


class ChooseRoute:
    """Which precision, which replica, and why."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def __call__(self, exchange: Exchange) -> None:
        assert exchange.caller
        exchange.route = self._router.route(exchange.caller.role, exchange.body["model"])


class AskUpstream:
    """Asks the chosen replica. The one place where anything is retried."""

    def __init__(self, config: Config, router: Router, engines: Upstream, providers: Upstream) -> None:
        self._config = config
        self._router = router
        self._engines = engines
        self._providers = providers

    async def __call__(self, exchange: Exchange) -> None:
        """Open the answer. What provably never reached an engine is routed anew: a connection that
        failed (its replica is left alone from now on), and once a pooled connection that was stale."""
        assert exchange.caller
        stale = 0
        for attempt in range(1, MOST_ATTEMPTS + 1):
            try:
                await self._open(exchange)
                return
            except NeverReachedError as error:
                stale += error.stale
                if attempt == MOST_ATTEMPTS or stale > 1:
                    raise
            exchange.route = self._router.route(exchange.caller.role, exchange.body["model"])

    async def _open(self, exchange: Exchange) -> None:
        assert exchange.route
        replica, wishes = exchange.route.replica, exchange.wishes
        provider = replica.variant == PROVIDER
        if provider:
            upstream, body = self._providers, with_usage(exchange.body, wishes)
        else:
            upstream = self._engines
            body = for_engine(exchange.body, wishes, self._config.model.name, self._config.quality)
        call = Call(exchange.path, body, wishes.stream)
        exchange.overhead_s = exchange.overhead_s or exchange.clock() - exchange.received
        replica.take()
        try:
            reply = await upstream.open(replica, call)
        except BaseException as error:
            replica.release()
            if isinstance(error, UpstreamError):
                _blame(replica, error)
            raise
        exchange.on_close.callback(replica.release)
        exchange.on_close.push_async_callback(reply.close)
        exchange.reply = reply
        exchange.batches = _watched(reply, replica)


async def _watched(reply: Reply, replica: Replica) -> AsyncIterator[list[Event]]:
    """The answer; its replica's breaker hears how it ended."""
    try:
        async for batch in reply.batches():
            yield batch
    except UpstreamError as error:
        _blame(replica, error)
        raise
    replica.breaker.answered()


def _blame(replica: Replica, error: UpstreamError) -> None:
    if isinstance(error, NeverReachedError):
        if not error.stale:
            replica.breaker.not_reached()
    elif isinstance(error, UpstreamRefusedError):
        replica.breaker.answered()
    else:
        replica.breaker.answer_broke()


class Listen:
    """Taps the answer: an event is handed on first and looked at afterwards."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    async def __call__(self, exchange: Exchange) -> None:
        assert exchange.batches
        exchange.batches = self._tap(exchange, exchange.batches)

    async def _tap(
        self, exchange: Exchange, batches: AsyncIterator[list[Event]]
    ) -> AsyncIterator[list[Event]]:
        assert exchange.caller
        assert exchange.route
        exchange.tapped = True
        async for batch in batches:
            at = exchange.clock()
            yield batch
            begun = exchange.clock()
            try:
                for event in batch if exchange.tapped else ():
                    if event.data is not None:
                        exchange.answer.add(event.data, at)
            except Exception:  # an engine may send what we have never seen: that breaks no request
                exchange.tapped = False
                self._observer.count_error("listen", exchange.caller.role, exchange.route.variant)
            exchange.overhead_s += exchange.clock() - begun


class AnswerClient:
    """Sends what the client asked for, unbuffered."""

    async def __call__(self, exchange: Exchange) -> None:
        assert exchange.batches
        wishes = exchange.wishes
        async with aclosing(exchange.batches) as batches:  # type: ignore[type-var]
            async for batch in batches:
                arrived = exchange.clock()
                payload = b"".join([as_wished(event, wishes) for event in batch])
                last = not wishes.stream or any(event.done for event in batch)
                exchange.overhead_s += exchange.clock() - arrived
                if not exchange.begun:
                    await self._begin(exchange, len(payload))
                if payload or last:
                    exchange.complete = last
                    await exchange.send(
                        {"type": "http.response.body", "body": payload, "more_body": not last}
                    )

    async def _begin(self, exchange: Exchange, size: int) -> None:
        if exchange.wishes.stream:
            headers = exchange.answer_headers("text/event-stream; charset=utf-8")
            headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        else:
            headers = exchange.answer_headers("application/json")
            headers.append((b"content-length", str(size).encode()))
        exchange.begun = True
        await exchange.send({"type": "http.response.start", "status": 200, "headers": headers})
