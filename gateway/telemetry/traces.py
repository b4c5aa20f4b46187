"""A span per request, by OpenTelemetry's conventions for generative AI.

They go to the process's tracer provider. Without one, which is the default, there are none and requests carry
the client's own trace headers on to engines; to have them, install an exporter and start the gateway under
``opentelemetry-instrument``. Prompts and answers are never part of a span.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opentelemetry.trace import (
    NoOpTracerProvider,
    ProxyTracerProvider,
    Span,
    SpanKind,
    StatusCode,
    Tracer,
    get_tracer_provider,
)

from gateway.proxy.record import Record
from gateway.telemetry.ledger import labels_of
from gateway.telemetry.propagation import W3C

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}


class Traces:
    """Begins and ends the spans of requests."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def begin(self, path: str, headers: Mapping[str, str]) -> Span:
        """A span below the client's own, if its headers name one."""
        operation = _OPERATIONS.get(path, path)
        return self._tracer.start_span(operation, W3C.extract(headers), SpanKind.SERVER)

    def end(self, span: Span, record: Record) -> None:
        """Say how a request went."""
        if span.is_recording():
            operation = _OPERATIONS.get(record.path, record.path)
            span.update_name(f"{operation} {record.model}" if record.role is not None else operation)
            span.set_attributes(_attributes(record, operation))
            if record.status >= 500:
                span.set_status(StatusCode.ERROR)
        span.end()


def _attributes(record: Record, operation: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "vllm",
        "http.request.method": "POST",
        "http.route": record.path,
        "http.response.status_code": record.status,
        "tiercel.request_id": record.request_id,
        "tiercel.overhead_s": record.overhead_s,
    }
    if record.role is not None:
        found |= {"gen_ai.agent.name": record.role, "gen_ai.request.model": record.model}
    if record.session is not None:
        found["gen_ai.conversation.id"] = record.session
    if record.parent is not None:
        found["tiercel.parent_session"] = record.parent
    if record.variant is not None and record.replica is not None:
        found |= {
            "gen_ai.response.model": ":".join(labels_of(record.variant, record.model)),
            "gen_ai.usage.output_tokens": record.usage.completion,
            "tiercel.variant": record.variant,
            "tiercel.replica": record.replica,
            "tiercel.route_reason": str(record.reason),
            "tiercel.hedged": record.hedged,
        }
    if record.usage.prompt is not None:
        found["gen_ai.usage.input_tokens"] = record.usage.prompt
    if record.first_token_s is not None:
        found["gen_ai.response.time_to_first_chunk"] = record.first_token_s
    if record.status >= 400:
        found["error.type"] = str(record.status)
    return found


def traces() -> Traces | None:
    """By the process's tracer provider; None when there is none."""
    provider = get_tracer_provider()
    if isinstance(provider, NoOpTracerProvider | ProxyTracerProvider):
        return None
    return Traces(provider.get_tracer("tiercel"))
