"""The hops of a request, each one concern. Their order is in ``app.py``. None of them waits."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from gateway.config import Config
from gateway.errors import BadRequestError, NeverReachedError
from gateway.identity import Identities
from gateway.proxy.body import Body
from gateway.proxy.endpoints import Form
from gateway.proxy.exchange import Attempt, Exchange
from gateway.routing.pools import PROVIDER, Replica
from gateway.routing.router import Reason, Router
from gateway.upstream.options import STREAM, OutputOptions
from gateway.upstream.readers import NamedStreamReader, Reader, StreamReader, TappedReader, WholeReader
from gateway.upstream.vllm import EngineAttempt, request_for

if TYPE_CHECKING:
    from gateway.upstream.litellm import LiteLLM

MOST_TRIES = 4
"""Replicas tried for one request at most, when connecting to each fails."""
_SHARE = 1 << 32


class Identify:
    """Who asks, and what: the key, and only then the body, the role and the session."""

    def __init__(self, config: Config) -> None:
        self._identities = Identities(config)

    def __call__(self, exchange: Exchange) -> None:
        head, endpoint = exchange.head, exchange.endpoint
        sender = head.memo
        if sender is None or sender.identities is not self._identities:
            sender = head.memo = self._identities.sender(head.headers)
        kind = head.headers.get("content-type", "")
        if kind != "application/json" and kind.partition(";")[0].strip().lower() != "application/json":
            # Also what keeps a web page from posting here unasked: browsers send this type only after a
            # preflight request, which the gateway does not answer.
            raise BadRequestError(
                "content-type: send the header `content-type: application/json`", param="content-type"
            )
        body = exchange.body = Body(exchange.raw, endpoint.check, endpoint.decoder)
        asked = body.fields
        exchange.model = asked.model
        if endpoint.form is Form.COMPLETIONS:
            exchange.options = OutputOptions.of(asked, chat=endpoint.chat)
        elif endpoint.form is not Form.PLAIN and asked.stream:
            exchange.options = STREAM
        exchange.caller = sender.caller(asked)


class ChooseRoute:
    """Which precision, which replica, and why."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def __call__(self, exchange: Exchange) -> None:
        assert exchange.caller
        exchange.route = self._router.route(exchange.caller, exchange.body, exchange.endpoint)


class AskUpstream:
    """Asks the chosen replica. The one place where anything is retried, and where anything is hedged."""

    def __init__(self, config: Config, router: Router, providers: LiteLLM) -> None:
        self._router = router
        self._providers = providers
        share = config.quality.sample_rate if config.quality.logprobs else 0.0
        self._tapped_below = int(share * _SHARE)
        self.escalates = {name for name, role in config.roles.items() if role.escalate}
        """Roles whose answers are looked at before the client gets them."""
        self._escalations = Escalations(config.watch.escalated_share)
        self._adapters = frozenset(config.adapters)
        """Their answers are not listened to: the reference without the adapter would say something else."""

    def __call__(self, exchange: Exchange) -> None:
        route = exchange.route
        assert route
        replica = route.replica
        exchange.raced = route.watched
        if exchange.reader is None:
            reader = exchange.reader = self._reader(exchange)
            exchange.tapped = reader if isinstance(reader, TappedReader) else None
        if replica.variant == PROVIDER:
            self._providers.ask(exchange, replica)
        else:
            self._ask(exchange, replica, route.work)
            if route.hedge_after_s is not None and not exchange.hedged:
                exchange.plane.later(route.hedge_after_s, lambda: self._hedge(exchange))

    def again(self, exchange: Exchange, attempt: EngineAttempt, error: NeverReachedError) -> None:
        """An attempt did no work upstream: route anew (its replica is left alone from now on, if it could
        not be reached), but only once for kept connections that had been closed."""
        exchange.tries += 1
        exchange.stale += error.stale
        others = len(exchange.attempts) > 1
        if others or exchange.finished or exchange.tries >= MOST_TRIES or exchange.stale > 1:
            exchange.broke(attempt, error)
            return
        exchange.attempts.remove(attempt)
        exchange.carry_on()

    def may_escalate(self, exchange: Exchange) -> bool:
        """Whether an answer that has come whole is looked at before the client gets it."""
        route = exchange.route
        if route is None or exchange.tapped is None or route.role not in self.escalates:
            return False
        return not exchange.escalated and route.reason is not Reason.EXPLICIT_VARIANT

    async def escalate(self, exchange: Exchange, attempt: Attempt) -> bool:
        """Ask the next more precise variant instead, if the answer that has come whole fails a check. Once
        per request, for a share of a role's answers, and never where the client has named the variant."""
        route, tapped = exchange.route, exchange.tapped
        if route is None or tapped is None:
            return False
        why = await exchange.snapshot.observer.insufficient(route.role, exchange.raw, tapped.answer)
        if not self._escalations.allows(route.role, why is not None) or why is None:
            return False
        higher = self._router.higher(route)
        if higher is None:
            return False
        exchange.plane.metrics.escalations.labels(route.role, route.variant, why).inc()
        exchange.plane.observe(exchange)
        exchange.spent = (*exchange.spent, (route, tapped.prompt_tokens or 0, tapped.completion_tokens))
        exchange.escalated, exchange.route = why, higher
        exchange.attempts.remove(attempt)
        exchange.reader = exchange.tapped = exchange.winner = None
        self(exchange)
        return True

    def _reader(self, exchange: Exchange) -> Reader:
        options, endpoint = exchange.options, exchange.endpoint
        if endpoint.form is not Form.COMPLETIONS:
            return NamedStreamReader() if options.stream else WholeReader()
        if exchange.model in self._adapters:
            return StreamReader(options) if options.stream else WholeReader()
        if not options.stream and exchange.caller and exchange.caller.role in self.escalates:
            return TappedReader(options)
        if self._tapped_below and sampled(exchange.sample_id, self._tapped_below):
            return TappedReader(options)
        return StreamReader(options) if options.stream else WholeReader()

    def _ask(self, exchange: Exchange, replica: Replica, work: float = 0.0) -> None:
        attempt = EngineAttempt(exchange, replica, request_for(exchange, replica), work)
        exchange.attempts.append(attempt)
        exchange.heard_at = exchange.plane.clock()
        attempt.start()

    def _hedge(self, exchange: Exchange) -> None:
        """Ask a second replica when the first one is slower than nearly always; the faster one wins."""
        route = exchange.route
        if exchange.finished or exchange.winner or not route or len(exchange.attempts) != 1:
            return
        busy = exchange.attempts[0].replica
        if (other := self._router.another(route, busy)) is not None:
            exchange.hedged = True
            self._ask(exchange, other)


class Escalations:
    """Bounds the share of a role's answers that are asked again, so that a harmed variant does not double the
    load on the next one: the watch is there to demote it."""

    _GRACE, _MEMORY = 20, 2000

    def __init__(self, share: float) -> None:
        self._share = share
        self._counts: dict[str, list[float]] = {}

    def allows(self, role: str, wanted: bool) -> bool:
        """Count an answer; whether it may be asked again, if that is ``wanted``."""
        counts = self._counts.setdefault(role, [0.0, 0.0])
        counts[0] += 1
        if counts[0] > self._MEMORY:
            counts[:] = [count / 2 for count in counts]
        allowed = wanted and counts[1] + 1 <= self._share * (counts[0] + self._GRACE)
        counts[1] += allowed
        return allowed


def sampled(request_id: str, below: int) -> bool:
    """Whether a request is in the sample: by a hash of its id, so that every part of the house agrees.
    ``below`` of 2**32 ids are."""
    if below >= _SHARE:
        return True
    return zlib.crc32(request_id.encode()) < below


Hop = Callable[[Exchange], None]
