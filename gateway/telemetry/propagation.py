"""Headers that go on to engines: those of tracing (W3C Trace Context), and the question for their load."""

from __future__ import annotations

from opentelemetry.trace import Span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

W3C = TraceContextTextMapPropagator()
PASSED_ON = ("traceparent", "tracestate", "baggage", "endpoint-load-metrics-format")
"""Headers of the client that engines are given: those of tracing, the one by which a load balancer asks for
ORCA's report, and none that authenticates."""


def carried(span: Span) -> dict[str, str]:
    """The headers by which an engine's own spans come below this one."""
    headers: dict[str, str] = {}
    W3C.inject(headers, set_span_in_context(span))
    return headers
