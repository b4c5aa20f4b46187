"""The way of every request: the hops before, the attempts, the reply, and the hops after.

Which hops there are and in what order stands in ``app.py``. A hop that has to wait for something returns an
awaitable; the exchange then goes on in a task of its own. However an exchange ends, its end is one place
(:meth:`Pipeline.finish`), where its frozen record is made, and every hop after gets that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from gateway.errors import ClientGoneError, GatewayError, UnexpectedError
from gateway.proxy.attempts import Attempts
from gateway.proxy.exchange import Exchange
from gateway.proxy.record import NO_USAGE, Record
from gateway.proxy.reply import Reply
from gateway.telemetry.logs import EVENTS

OTHER = "other"
"""The model of a request that named none that exists, in records and metrics."""

Hop = Callable[[Exchange], Awaitable[None] | None]
"""Decides one thing about a request. Raises GatewayError to refuse it."""


class AfterHop(Protocol):
    """Does something with a request that is over. It must not wait; what it raises is logged."""

    def __call__(self, record: Record, exchange: Exchange) -> None: ...


class Pipeline:
    """Moves exchanges. ``known_models``: names that may stand in records; ``ended`` is told of each end."""

    def __init__(
        self,
        before: Sequence[Hop],
        attempts: Attempts,
        reply: Reply,
        after: Sequence[AfterHop],
        known_models: frozenset[str],
        clock: Callable[[], float],
        ended: Callable[[Exchange], None],
    ) -> None:
        self.before = tuple(before)
        self.attempts = attempts
        self.reply = reply
        self.after = tuple(after)
        self.known_models = known_models
        self._clock = clock
        self._ended = ended
        self._log = logging.getLogger(EVENTS)

    def start(self, exchange: Exchange) -> None:
        """Take a request in hand."""
        try:
            for index, hop in enumerate(self.before):
                waiting = hop(exchange)
                if waiting is not None:
                    self.spawn(exchange, self._resume(exchange, waiting, index + 1))
                    break
            else:
                self.attempts.begin(exchange)
        except GatewayError as error:
            self.fail(exchange, error)
        except Exception as error:
            self.defect(exchange, error)
        exchange.overhead_s += self._clock() - exchange.received

    async def _resume(self, exchange: Exchange, waiting: Awaitable[None], next_hop: int) -> None:
        await waiting
        for hop in self.before[next_hop:]:
            if exchange.finished:
                return
            if (waiting_too := hop(exchange)) is not None:
                await waiting_too
        if not exchange.finished:
            self.attempts.begin(exchange)

    def spawn(self, exchange: Exchange, work: Coroutine[Any, Any, None]) -> None:
        """Do for an exchange what has to be waited for; it ends with the exchange."""
        exchange.task = asyncio.get_running_loop().create_task(self._guarded(exchange, work))

    async def _guarded(self, exchange: Exchange, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except GatewayError as error:
            self.fail(exchange, error)
        except Exception as error:
            self.defect(exchange, error)

    # what the client's connection reports

    def client_left(self, exchange: Exchange) -> None:
        self.fail(exchange, ClientGoneError("The client closed the connection."))

    def client_paused(self, exchange: Exchange) -> None:
        exchange.paused_at = self._clock()
        for attempt in exchange.attempts:
            attempt.pause()

    def client_resumed(self, exchange: Exchange) -> None:
        exchange.paused_at = None
        exchange.heard_at = self._clock()
        for attempt in exchange.attempts:
            attempt.resume()

    def sweep(self, exchange: Exchange, now: float) -> None:
        self.attempts.sweep(exchange, now)

    # ending

    def fail(self, exchange: Exchange, error: GatewayError) -> None:
        if exchange.finished:
            return
        exchange.error = error
        if not isinstance(error, ClientGoneError):
            self.reply.error(exchange, error)
        elif exchange.paused_at is not None:
            exchange.client.abort()
        self.finish(exchange)

    def defect(self, exchange: Exchange, error: Exception) -> None:
        defect = UnexpectedError(error)
        fields = {"request_id": exchange.request_id, "cause": defect.internal}
        self._log.error("request failed", extra={"fields": fields})
        self.fail(exchange, defect)

    def finish(self, exchange: Exchange) -> None:
        exchange.finished = True
        task = exchange.task
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        for attempt in exchange.attempts:
            if not attempt.over:
                attempt.cancel()
        self._ended(exchange)
        record = self._record(exchange)
        for hop in self.after:
            try:
                hop(record, exchange)
            except Exception as error:
                fields = {"request_id": exchange.request_id}
                self._log.error("a hop after a request failed", exc_info=error, extra={"fields": fields})
        # Attempts know their exchange: as a ring, all of it would be left to the garbage collector.
        exchange.attempts = []
        exchange.winner = exchange.task = exchange.spare = None

    def _record(self, exchange: Exchange) -> Record:
        caller, route, reader, error = exchange.caller, exchange.route, exchange.reader, exchange.error
        key = caller.key if caller is not None else None
        first = exchange.first_at
        # By position: by name it takes five times as long, and this is done for every request.
        return Record(
            exchange.request_id,
            exchange.endpoint.path,
            key.name if key is not None else None,
            key.tenant if key is not None else None,
            caller.role if caller is not None else None,
            caller.session if caller is not None else None,
            caller.parent if caller is not None else None,
            exchange.model if exchange.model in self.known_models else OTHER,
            route.variant if route is not None else None,
            route.replica.name if route is not None else None,
            route.reason if route is not None else None,
            200 if error is None else error.status,
            None if error is None else error.logged,
            exchange.options.stream,
            NO_USAGE if reader is None else reader.usage,
            exchange.spent,
            self._clock() - exchange.received,
            None if first is None else first - exchange.received,
            tuple(exchange.gaps or ()),
            exchange.overhead_s,
            exchange.hedged,
            exchange.won,
            exchange.escalated,
        )
