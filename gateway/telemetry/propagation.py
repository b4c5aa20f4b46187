"""Trace headers (W3C Trace Context) for what the gateway asks of engines."""

from __future__ import annotations

from opentelemetry.trace import Span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

W3C = TraceContextTextMapPropagator()
PASSED_ON = ("traceparent", "tracestate", "baggage")
"""Headers of the client that engines are given: those of tracing, and none that authenticates."""


def carried(span: Span) -> dict[str, str]:
    """The headers by which an engine's own spans come below this one."""
    headers: dict[str, str] = {}
    W3C.inject(headers, set_span_in_context(span))
    return headers
