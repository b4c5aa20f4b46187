"""A span per request, by OpenTelemetry's conventions for generative AI.

They go to the process's tracer provider. Without one, which is the default, there are none and requests carry
the client's own trace headers on to engines; to have them, install an exporter and start the gateway under
``opentelemetry-instrument``. Prompts and answers are never part of a span.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opentelemetry.trace import (
    NoOpTracerProvider,
    ProxyTracerProvider,
    Span,
    SpanKind,
    StatusCode,
    Tracer,
    get_tracer_provider,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from gateway.proxy.exchange import Exchange

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_W3C = TraceContextTextMapPropagator()


class Traces:
    """Begins and ends the spans of requests."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def begin(self, path: str, headers: Mapping[str, str]) -> Span:
        """A span below the client's own, if its headers name one."""
        operation = _OPERATIONS.get(path, path)
        return self._tracer.start_span(operation, _W3C.extract(headers), SpanKind.SERVER)

    def end(self, span: Span, exchange: Exchange) -> None:
        """Say how a request went."""
        if span.is_recording():
            path, error = exchange.endpoint.path, exchange.error
            status = 200 if error is None else error.status
            operation = _OPERATIONS.get(path, path)
            span.update_name(f"{operation} {exchange.model}" if exchange.model else operation)
            span.set_attributes(_said(exchange, operation, path, status))
            if status >= 500:
                span.set_status(StatusCode.ERROR)
        span.end()


def _said(exchange: Exchange, operation: str, path: str, status: int) -> dict[str, Any]:
    caller, route, reader = exchange.caller, exchange.route, exchange.reader
    found: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "vllm",
        "http.request.method": "POST",
        "http.route": path,
        "http.response.status_code": status,
        "tiercel.request_id": exchange.request_id,
        "tiercel.overhead_s": exchange.overhead_s,
    }
    if exchange.model:
        found["gen_ai.request.model"] = exchange.model
    if caller is not None:
        found["gen_ai.agent.name"] = caller.role
        if caller.session is not None:
            found["gen_ai.conversation.id"] = caller.session
    if route is not None:
        found |= {
            "gen_ai.response.model": f"{exchange.snapshot.model}:{route.variant}",
            "tiercel.variant": route.variant,
            "tiercel.replica": route.replica.name,
            "tiercel.route_reason": route.reason.value,
            "tiercel.hedged": exchange.hedged,
        }
    if reader is not None:
        found["gen_ai.usage.output_tokens"] = reader.completion_tokens
        if reader.prompt_tokens is not None:
            found["gen_ai.usage.input_tokens"] = reader.prompt_tokens
    if exchange.first_at is not None:
        found["gen_ai.response.time_to_first_chunk"] = exchange.first_at - exchange.received
    if status >= 400:
        found["error.type"] = str(status)
    return found


def carried(span: Span) -> dict[str, str]:
    """The headers by which an engine's own spans come below this one."""
    headers: dict[str, str] = {}
    _W3C.inject(headers, set_span_in_context(span))
    return headers


def traces() -> Traces | None:
    """By the process's tracer provider; None when there is none."""
    provider = get_tracer_provider()
    if isinstance(provider, NoOpTracerProvider | ProxyTracerProvider):
        return None
    return Traces(provider.get_tracer("tiercel"))
