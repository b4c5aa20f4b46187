"""The books: every finished request in the metrics, and as a line of the access log."""

from __future__ import annotations

import time

import msgspec

from gateway.proxy.exchange import Exchange
from gateway.routing.router import Route
from gateway.telemetry.counters import Counter, Histogram
from gateway.telemetry.logs import AccessLog
from gateway.telemetry.metrics import OTHER, Metrics

NO_VARIANT = "none"
"""The variant label of a request that got no route."""


class _Line(msgspec.Struct, gc=False):
    """What the access log says of a request. Never a prompt or an answer."""

    time: float
    """Unix time, seconds."""
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
    """The metrics of requests of one kind: of a key, role, model, variant, reason and outcome. Found once."""

    __slots__ = (
        "completion",
        "duration",
        "first_token",
        "gaps",
        "key_completion",
        "key_prompt",
        "overhead",
        "prompt",
        "requests",
        "routes",
    )

    def __init__(self, metrics: Metrics, kind: _Kind) -> None:
        key, role, model, variant, reason, outcome = kind
        self.requests: Counter = metrics.requests.labels(role, model, variant, str(outcome))
        self.routes: Counter = metrics.routes.labels(role, variant, reason)
        self.duration: Histogram = metrics.duration.labels(role, variant)
        self.overhead: Histogram = metrics.overhead.labels(role, variant)
        self.first_token: Histogram = metrics.first_token.labels(role, variant)
        self.gaps: Histogram = metrics.token_gap.labels(role, variant)
        self.prompt: Counter = metrics.tokens.labels(role, variant, "prompt")
        self.completion: Counter = metrics.tokens.labels(role, variant, "completion")
        self.key_prompt: Counter | None = None
        self.key_completion: Counter | None = None
        if key is not None:
            self.key_prompt = metrics.key_tokens.labels(key, role, variant, "prompt")
            self.key_completion = metrics.key_tokens.labels(key, role, variant, "completion")


_Kind = tuple[str | None, str, str, str, str, int]


class Ledger:
    """Writes a finished request into the metrics and the access log."""

    def __init__(self, metrics: Metrics, log: AccessLog) -> None:
        self._metrics = metrics
        self.log = log
        self._books: dict[_Kind, _Books] = {}

    def record(self, exchange: Exchange) -> None:
        route, caller, reader, error = exchange.route, exchange.caller, exchange.reader, exchange.error
        snapshot = exchange.snapshot
        model = exchange.model if exchange.model in snapshot.known_models else OTHER
        took = exchange.plane.clock() - exchange.received
        prompt, completion = (reader.prompt_tokens, reader.completion_tokens) if reader else (None, 0)
        status = 200 if error is None else error.status
        if route is not None and caller is not None:
            key = caller.key.name if caller.key is not None else None
            kind = (key, caller.role, model, route.variant, route.reason, status)
            books = self._books.get(kind)
            if books is None:
                books = self._books[kind] = _Books(self._metrics, kind)
            self._enter(books, exchange, took, prompt or 0, completion)
            for spent in exchange.spent:
                self._enter_spent(key, *spent)
        else:
            role = caller.role if caller is not None else OTHER
            self._metrics.requests.labels(role, model, NO_VARIANT, str(status)).inc()
        if error is not None or snapshot.config.gateway.access_log:
            self.log.write(_line(exchange, model, status, took, prompt, completion))

    def _enter_spent(self, key: str | None, route: Route, prompt: int, completion: int) -> None:
        """Tokens of an answer that nobody got."""
        for kind, tokens in (("prompt", prompt), ("completion", completion)):
            self._metrics.tokens.labels(route.role, route.variant, kind).inc(tokens)
            if key is not None:
                self._metrics.key_tokens.labels(key, route.role, route.variant, kind).inc(tokens)

    def _enter(self, books: _Books, exchange: Exchange, took: float, prompt: int, completion: int) -> None:
        books.requests.value += 1
        books.routes.value += 1
        books.duration.observe(took)
        books.overhead.observe(exchange.overhead_s)
        books.prompt.value += prompt
        books.completion.value += completion
        if books.key_prompt is not None and books.key_completion is not None:
            books.key_prompt.value += prompt
            books.key_completion.value += completion
        if exchange.first_at is not None:
            books.first_token.observe(exchange.first_at - exchange.received)
            for gap in exchange.gaps or ():
                books.gaps.observe(gap)


def _line(
    exchange: Exchange, model: str, status: int, took: float, prompt: int | None, completion: int
) -> _Line:
    caller, route, error, first = exchange.caller, exchange.route, exchange.error, exchange.first_at
    key = caller.key if caller is not None else None
    return _Line(
        time.time(),
        exchange.request_id,
        exchange.endpoint.path,
        key.name if key is not None else None,
        key.tenant if key is not None else None,
        caller.role if caller is not None else None,
        caller.session if caller is not None else None,
        model,
        route.variant if route is not None else None,
        route.replica.name if route is not None else None,
        route.reason if route is not None else None,
        status,
        prompt,
        completion,
        took,
        first - exchange.received if first is not None else None,
        exchange.overhead_s,
        exchange.hedged,
        error.logged if error is not None else None,
    )
