"""The books: every finished request in the metrics, and as a line of the access log."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from gateway.exchange import Exchange
from gateway.telemetry.logs import AccessLog
from gateway.telemetry.metrics import OTHER, Metrics
from gateway.telemetry.tallies import Count, Spread

NO_VARIANT = "none"
"""The variant label of a request that got no route."""
NO_KEY = "none"


class _Line(msgspec.Struct):
    """What the access log says of a request. Never a prompt or an answer."""

    time: float
    request_id: str
    path: str
    key: str | None
    tenant: str | None
    role: str | None
    session: str | None
    model: str
    variant: str | None
    replica: str | None
    reason: str | None
    status: int
    prompt_tokens: int | None
    completion_tokens: int
    duration_s: float
    first_token_s: float | None
    overhead_s: float
    hedged: bool
    error: str | None
    logger: str = "tiercel.access"


class _Books:
    """The metrics of one role and variant, found once."""

    __slots__ = ("completion", "duration", "first_token", "gaps", "overhead", "prompt")

    def __init__(self, metrics: Metrics, role: str, variant: str) -> None:
        self.duration: Spread = metrics.duration.labels(role, variant)
        self.overhead: Spread = metrics.overhead.labels(role, variant)
        self.first_token: Spread = metrics.first_token.labels(role, variant)
        self.gaps: Spread = metrics.token_gap.labels(role, variant)
        self.prompt: Count = metrics.tokens.labels(role, variant, "prompt")
        self.completion: Count = metrics.tokens.labels(role, variant, "completion")


class Ledger:
    """Writes a finished request into the metrics and the access log."""

    def __init__(self, metrics: Metrics, log: AccessLog) -> None:
        self._metrics = metrics
        self.log = log
        self._books: dict[tuple[str, str], _Books] = {}

    def record(self, exchange: Exchange) -> None:
        metrics, route, caller, reader = self._metrics, exchange.route, exchange.caller, exchange.reader
        setup = exchange.setup
        role = metrics.role(caller.role) if caller else OTHER
        variant = route.variant if route else NO_VARIANT
        asked = exchange.body.get("model")
        model = asked if isinstance(asked, str) and asked in setup.known_models else OTHER
        took = exchange.plane.clock() - exchange.received
        metrics.requests.labels(role, model, variant, str(exchange.status)).inc()
        prompt = reader.prompt_tokens if reader else None
        completion = reader.completion_tokens if reader else 0
        if route is not None:
            self._enter(exchange, role, variant, took, prompt or 0, completion)
        if setup.config.gateway.access_log or exchange.error is not None:
            self.log.write(_line(exchange, model, took, prompt, completion))

    def _enter(
        self, exchange: Exchange, role: str, variant: str, took: float, prompt: int, completion: int
    ) -> None:
        books = self._books.get((role, variant))
        if books is None:
            books = self._books[role, variant] = _Books(self._metrics, role, variant)
        assert exchange.route
        books.duration.observe(took)
        books.overhead.observe(exchange.overhead_s)
        self._metrics.routes.labels(role, variant, exchange.route.reason).inc()
        books.prompt.inc(prompt)
        books.completion.inc(completion)
        if exchange.first_at is not None:
            books.first_token.observe(exchange.first_at - exchange.received)
            for gap in exchange.gaps:
                books.gaps.observe(gap)
        caller = exchange.caller
        if caller is not None and caller.key is not None:
            tokens = self._metrics.key_tokens
            tokens.labels(caller.key.name, role, variant, "prompt").inc(prompt)
            tokens.labels(caller.key.name, role, variant, "completion").inc(completion)


def _line(exchange: Exchange, model: str, took: float, prompt: int | None, completion: int) -> Any:
    caller, route, error, first = exchange.caller, exchange.route, exchange.error, exchange.first_at
    key = caller.key if caller else None
    return _Line(
        time=time.time(),
        request_id=exchange.request_id,
        path=exchange.path,
        key=key.name if key else None,
        tenant=key.tenant if key else None,
        role=caller.role if caller else None,
        session=caller.session if caller else None,
        model=model,
        variant=route.variant if route else None,
        replica=route.replica.name if route else None,
        reason=route.reason if route else None,
        status=exchange.status,
        prompt_tokens=prompt,
        completion_tokens=completion,
        duration_s=round(took, 5),
        first_token_s=round(first - exchange.received, 5) if first is not None else None,
        overhead_s=round(exchange.overhead_s, 6),
        hedged=exchange.hedged,
        error=(error.internal or error.message) if error else None,
    )
