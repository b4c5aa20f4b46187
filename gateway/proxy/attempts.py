"""Attempts at an answer: the one place of retry, hedge and escalation, and of who wins.

An exchange has one attempt at a time, or two while it is hedged. Which ones may follow on each other:

==================  ===========================================================================
retry               after an attempt that provably did no work (:func:`may_try_again`)
hedge               beside a first one that is slower than nearly all are, within a budget
escalation          after a whole answer of a cheaper variant that fails a check; where nothing comes of
                    it, the client gets that answer
==================  ===========================================================================

The first attempt that gives a part of an answer wins, and the other one is cancelled.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol

import msgspec

from gateway.errors import (
    ClientGoneError,
    GatewayError,
    NeverReachedError,
    NoReplicaError,
    UpstreamError,
    UpstreamTimeoutError,
)
from gateway.identity import Sampler
from gateway.proxy.endpoints import Form
from gateway.proxy.escalations import Escalations
from gateway.proxy.exchange import Attempt, Exchange
from gateway.proxy.limits import Limits
from gateway.proxy.record import Spent, Usage
from gateway.proxy.reply import JSON, Reply, only_comments
from gateway.proxy.waiting import WaitingLines
from gateway.quality.answer import Answer
from gateway.routing.choices import Reason
from gateway.routing.pools import PROVIDER
from gateway.routing.replicas import Replica
from gateway.routing.router import Route
from gateway.upstream.readers import Reader, reader_for

MOST_TRIES = 4
"""Attempts at one request that may come to nothing, before it is given up."""


class Routes(Protocol):
    """What is needed of the router."""

    def higher(self, route: Route) -> Route | None: ...

    def another(self, route: Route, busy: Replica) -> Replica | None: ...


class Upstream(Protocol):
    """Makes attempts: at engines, or at providers. ``listener`` hears how they go."""

    def attempt(self, listener: Attempts, exchange: Exchange, replica: Replica, work: float) -> Attempt: ...


class Sufficient(Protocol):
    """Says what is wrong with an answer of a role that escalates; None if nothing, or no time to look."""

    async def insufficient(self, role: str, body: bytes, answer: Answer, salt: str) -> str | None: ...


class Attempts:
    """Asks the chosen replica, hears how that goes, and hands the answer on."""

    def __init__(
        self,
        limits: Limits,
        choose: Callable[[Exchange], None],
        router: Routes,
        engines: Upstream,
        providers: Upstream,
        reply: Reply,
        lines: WaitingLines,
        clock: Callable[[], float],
        checks: Sufficient,
        took: Callable[[Exchange, Attempt, float], None],
        escalated: Callable[[Exchange, str], None],
        may_hedge: Callable[[], bool],
    ) -> None:
        """``choose`` sets an exchange's route. ``took`` is told after how long a request was answered first,
        ``escalated`` of an answer that nobody got and why, before it is forgotten."""
        self._limits = limits
        self._choose = choose
        self._router = router
        self._engines = engines
        self._providers = providers
        self._reply = reply
        self._lines = lines
        self._clock = clock
        self._checks = checks
        self._took = took
        self._escalated = escalated
        self._may_hedge = may_hedge
        self._sampled = Sampler(limits.listened_share)
        self._escalations = Escalations(limits.escalated_share)

    # asking

    def begin(self, exchange: Exchange) -> None:
        """Choose a replica and ask it. Raises GatewayError; where the role waits for a replica, the exchange
        goes on in a task."""
        caller = exchange.caller
        assert caller is not None
        wait_s = self._limits.wait_s.get(caller.role, 0.0)
        if not wait_s:
            self._choose(exchange)
            self._ask(exchange)
            return
        key = (caller.role, exchange.model, caller.key.models if caller.key is not None else ())
        if not self._lines.waits(key):
            try:
                self._choose_and_ask(exchange)
                return
            except NoReplicaError as error:
                if not error.may_wait:
                    raise
        until = self._clock() + wait_s
        self._spawn(exchange, self._lines.wait(key, exchange, until, self._choose_and_ask))

    def _choose_and_ask(self, exchange: Exchange) -> None:
        self._choose(exchange)
        self._ask(exchange)

    def _ask(self, exchange: Exchange) -> None:
        route = exchange.route
        assert route is not None
        if exchange.reader is None:
            sampled = self._sampled()
            if sampled or self._limits.escalates or exchange.follower is not None:
                exchange.read_with(self._reader(exchange, sampled), stream=exchange.options.stream)
            else:
                exchange.reader = reader_for(exchange.endpoint.form, exchange.options)
        self._attempt(exchange, route.replica, route.work)
        if route.hedge_after_s is not None and not exchange.hedged:
            asyncio.get_running_loop().call_later(route.hedge_after_s, self._hedge, exchange, route)

    def _attempt(self, exchange: Exchange, replica: Replica, work: float = 0.0) -> None:
        upstream = self._providers if replica.variant == PROVIDER else self._engines
        attempt = upstream.attempt(self, exchange, replica, work)
        exchange.attempts.append(attempt)
        if exchange.task is not None or exchange.tries or exchange.hedged or exchange.spent:
            exchange.heard_at = self._clock()  # else it has come in this very step
        attempt.start()

    def _reader(self, exchange: Exchange, sampled: bool) -> Reader:
        form, limits = exchange.endpoint.form, self._limits
        tapped = (
            form is Form.COMPLETIONS
            and (sampled or self._escalates(exchange))
            and exchange.model not in limits.adapters
            and exchange.endpoint.text
        )
        return reader_for(form, exchange.options, tapped=tapped)

    def _escalates(self, exchange: Exchange) -> bool:
        caller = exchange.caller
        return not exchange.options.stream and caller is not None and caller.role in self._limits.escalates

    def _hedge(self, exchange: Exchange, route: Route) -> None:
        """Ask a second replica when the first one is slower than nearly always."""
        if exchange.finished or exchange.winner or exchange.route is not route or len(exchange.attempts) != 1:
            return
        other = self._router.another(route, exchange.attempts[0].replica)
        if other is not None and self._may_hedge():
            exchange.hedged = True
            try:
                self._attempt(exchange, other)
            except GatewayError as error:
                exchange.pipeline.fail(exchange, error)
            except Exception as error:
                exchange.pipeline.defect(exchange, error)

    def _spawn(self, exchange: Exchange, work: Coroutine[Any, Any, None]) -> None:
        exchange.task = asyncio.get_running_loop().create_task(_guarded(exchange, work))

    # what attempts report

    def arrived(self, attempt: Attempt, payload: bytes) -> None:
        """A part of a stream, never empty."""
        exchange, now = attempt.exchange, self._clock()
        if exchange.finished:
            attempt.cancel()
            return
        exchange.heard_at = attempt.replica.heard_at = now
        try:
            if exchange.winner is not attempt:
                if payload[0] == 58 and exchange.hedged and only_comments(payload):
                    return  # it lives, and has nothing to say yet
                self._win(exchange, attempt, now)
            reader = exchange.reader
            assert reader is not None
            out = reader.feed(payload, now)
            if out:
                self._reply.part(exchange, out, now)
        except GatewayError as error:
            exchange.pipeline.fail(exchange, error)
        except Exception as error:
            exchange.pipeline.defect(exchange, error)
        exchange.overhead_s += self._clock() - now

    def ended(self, attempt: Attempt) -> None:
        """The last byte of a stream has come."""
        exchange = attempt.exchange
        if exchange.finished:
            return
        reader, breaker = exchange.reader, attempt.replica.breaker
        if reader is not None and reader.done:
            if not breaker.no_failures:
                breaker.answered()
            self._reply.end(exchange)
            exchange.pipeline.finish(exchange)
            return
        breaker.errored()
        error = UpstreamError("The engine ended its answer before it was complete.")
        if exchange.winner is attempt:
            exchange.pipeline.fail(exchange, error)
        else:  # nothing but comments: the other one of a hedged pair may still answer
            self.broke(attempt, error)

    def whole(self, attempt: Attempt, body: bytes, content_type: bytes | None = None) -> None:
        """All of an answer that is not streamed."""
        exchange, now = attempt.exchange, self._clock()
        if exchange.finished:
            return
        attempt.replica.heard_at = now
        try:
            self._win(exchange, attempt, now)
            if content_type is not None or exchange.options.stream:  # not what was asked for
                options = dataclasses.replace(exchange.options, stream=False)
                tapped = exchange.tapped is not None
                reader = reader_for(exchange.endpoint.form, options, content_type, tapped=tapped)
                exchange.read_with(reader, stream=False)
            assert exchange.reader is not None
            out = exchange.reader.feed(body, now)
            breaker = attempt.replica.breaker
            if not breaker.no_failures:
                breaker.answered()
            if exchange.tapped is not None and self._escalates(exchange):
                self._spawn(exchange, self._check(exchange, attempt, out))
            else:
                exchange.overhead_s += self._clock() - now
                self._reply.whole(exchange, out, content_type or JSON)
                exchange.pipeline.finish(exchange)
        except GatewayError as error:
            self._fail(exchange, error)
        except Exception as error:
            exchange.pipeline.defect(exchange, error)

    def broke(self, attempt: Attempt, error: UpstreamError) -> None:
        """An attempt failed: another one is made if it did no work; a hedged pair is left to the other."""
        exchange = attempt.exchange
        if attempt in exchange.attempts:
            exchange.attempts.remove(attempt)
            if not attempt.did_nothing:
                exchange.owing = (*exchange.owing, attempt)
        if exchange.finished or exchange.attempts:
            return
        if exchange.spare is not None or not may_try_again(exchange, error):
            self._fail(exchange, error)
            return
        exchange.tries += 1
        try:
            self.begin(exchange)
        except GatewayError as refused:
            exchange.pipeline.fail(exchange, refused)
        except Exception as defect:
            exchange.pipeline.defect(exchange, defect)

    def _win(self, exchange: Exchange, attempt: Attempt, now: float) -> None:
        """An attempt answers, before any other: the client gets its answer."""
        exchange.winner = attempt
        if not attempt.replica.breaker.no_failures:
            attempt.replica.breaker.heard()
        route = exchange.route
        assert route is not None
        if route.kind is not None or self._limits.paced:
            self._took(exchange, attempt, now - exchange.received)
        if not exchange.hedged:
            return
        for other in exchange.attempts:
            if other is not attempt:
                other.cancel()
                if other.sent:
                    lost = Spent(other.replica.variant, other.replica.name, Usage(), "hedged")
                    exchange.spent = (*exchange.spent, lost)
                    exchange.owing = (*exchange.owing, other)
        exchange.attempts = [attempt]
        first = attempt.replica is route.replica
        exchange.won = "first" if first else "second"
        if not first:
            exchange.route = msgspec.structs.replace(route, replica=attempt.replica)

    # escalation

    async def _check(self, exchange: Exchange, attempt: Attempt, out: bytes) -> None:
        """Look at a whole answer before the client gets it."""
        tapped, route = exchange.tapped, exchange.route
        assert tapped is not None
        assert route is not None
        why = higher = None
        if exchange.escalated is None and route.reason is not Reason.EXPLICIT_VARIANT:
            salt = exchange.caller.cache_salt if exchange.caller else ""
            why = await self._checks.insufficient(route.role, exchange.body.json, tapped.answer, salt)
            if self._escalations.allows(route.role, why is not None):
                higher = self._router.higher(route)
        if exchange.finished:
            return
        now = self._clock()
        if higher is None or why is None:
            exchange.overhead_s += self._clock() - now
            self._reply.whole(exchange, out)
            exchange.pipeline.finish(exchange)
            return
        self._escalated(exchange, why)
        spent = Spent(route.variant, route.replica.name, tapped.usage, "escalated")
        exchange.spent = (*exchange.spent, spent)
        if not tapped.usage.exact:
            exchange.owing = (*exchange.owing, attempt)
        exchange.escalated, exchange.route = why, higher
        if attempt in exchange.attempts:
            exchange.attempts.remove(attempt)
        exchange.spare = partial(self._keep_to, exchange, attempt, exchange.reader, route, spent, out)
        exchange.reader = exchange.tapped = exchange.winner = None
        try:
            self._ask(exchange)
        except GatewayError as error:
            self._fail(exchange, error)

    def _keep_to(
        self,
        exchange: Exchange,
        attempt: Attempt,
        reader: Reader | None,
        route: Route,
        spent: Spent,
        out: bytes,
    ) -> None:
        """Nothing better has come: the client gets the answer that was to be bettered. It has been looked at
        already, and is booked as what it is now."""
        exchange.winner, exchange.reader, exchange.tapped = attempt, reader, None
        exchange.route, exchange.escalated = route, None
        exchange.spent = tuple(one for one in exchange.spent if one is not spent)
        self._reply.whole(exchange, out)
        exchange.pipeline.finish(exchange)

    def _fail(self, exchange: Exchange, error: GatewayError) -> None:
        """No attempt is left: end with the answer that was there before an escalation, or with ``error``."""
        spare, exchange.spare = exchange.spare, None
        if spare is None or exchange.begun or exchange.finished:
            exchange.pipeline.fail(exchange, error)
        else:
            spare()

    # from time to time

    def sweep(self, exchange: Exchange, now: float) -> None:
        """End what takes too long."""
        if exchange.paused_at is not None and now - exchange.paused_at > self._limits.idle_s:
            exchange.pipeline.fail(exchange, ClientGoneError("The client does not read its answer."))
        elif (overdue := self._limits.overdue(exchange, now)) is not None:
            self._time_out(exchange, *overdue)

    def _time_out(self, exchange: Exchange, said: str, setting: str) -> None:
        """A replica that was not heard of at all meanwhile counts as silent; one that works on long answers,
        this one's or others', does not."""
        for attempt in exchange.attempts:
            if attempt.replica.heard_at <= exchange.heard_at:
                attempt.replica.breaker.silent()
        names = ", ".join(attempt.replica.where for attempt in exchange.attempts)
        error = UpstreamTimeoutError(f"{said} (gateway.{setting}).", internal=f"{said} ({setting}): {names}")
        self._fail(exchange, error)


def may_try_again(exchange: Exchange, error: UpstreamError) -> bool:
    """Whether a request may be sent once more: only when its last attempt provably did no work (no
    connection could be made, or nothing was acknowledged of what was sent over a kept one), nobody has got
    a byte, and it has not come to nothing too often. Never after an engine may have begun."""
    return isinstance(error, NeverReachedError) and not exchange.begun and exchange.tries + 1 < MOST_TRIES


async def _guarded(exchange: Exchange, work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except GatewayError as error:
        exchange.pipeline.fail(exchange, error)
    except Exception as error:
        exchange.pipeline.defect(exchange, error)
