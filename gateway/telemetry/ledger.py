"""The books: every finished request in the metrics, and as a line of the access log."""

from __future__ import annotations

import logging

from gateway.exchange import Exchange
from gateway.telemetry.logs import ACCESS
from gateway.telemetry.metrics import OTHER, Metrics

NO_VARIANT = "none"
"""The variant label of a request that got no route."""


class Ledger:
    """Writes a finished request into the metrics and the access log."""

    def __init__(self, metrics: Metrics, known_models: frozenset[str]) -> None:
        self._metrics = metrics
        self._known_models = known_models
        self._log = logging.getLogger(ACCESS)

    def record(self, exchange: Exchange) -> None:
        metrics, route, answer = self._metrics, exchange.route, exchange.answer
        role = metrics.role(exchange.caller.role if exchange.caller else None)
        variant = route.variant if route else NO_VARIANT
        self._log.info("request", extra={"fields": self._figures(exchange)})
        metrics.requests.labels(role, self._model(exchange), variant, str(exchange.status)).inc()
        if route is None:
            return
        metrics.duration.labels(role, variant).observe(exchange.clock() - exchange.received)
        metrics.overhead.labels(role, variant).observe(_overhead(exchange))
        metrics.routes.labels(role, variant, route.reason).inc()
        metrics.tokens.labels(role, variant, "prompt").inc(answer.prompt_tokens or 0)
        metrics.tokens.labels(role, variant, "completion").inc(answer.completion_tokens)
        if exchange.wishes.stream and answer.first_token_at is not None:
            metrics.first_token.labels(role, variant).observe(answer.first_token_at - exchange.received)
            gaps = metrics.token_gap.labels(role, variant)
            for gap in answer.gaps_s:
                gaps.observe(gap)

    def _figures(self, exchange: Exchange) -> dict[str, object]:
        """What the access log says of a request."""
        route, answer = exchange.route, exchange.answer
        first = answer.first_token_at
        return {
            "request_id": exchange.request_id,
            "path": exchange.path,
            "role": exchange.caller.role if exchange.caller else None,
            "session": exchange.caller.session if exchange.caller else None,
            "model": self._model(exchange),
            "variant": route.variant if route else None,
            "replica": route.replica.name if route else None,
            "reason": route.reason if route else None,
            "status": exchange.status,
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "duration_s": round(exchange.clock() - exchange.received, 4),
            "first_token_s": round(first - exchange.received, 4) if first else None,
            "overhead_s": round(_overhead(exchange), 5),
            "error": exchange.error and (exchange.error.internal or exchange.error.message),
        }

    def _model(self, exchange: Exchange) -> str:
        model = exchange.body.get("model")
        return model if isinstance(model, str) and model in self._known_models else OTHER


def _overhead(exchange: Exchange) -> float:
    return exchange.overhead_s + (exchange.reply.busy_s if exchange.reply else 0.0)
