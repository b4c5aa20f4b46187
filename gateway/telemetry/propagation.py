"""Headers that go on to engines: those of tracing (W3C Trace Context), the question for their load, and
SageMaker's session."""

from __future__ import annotations

from opentelemetry.trace import Span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

W3C = TraceContextTextMapPropagator()
PASSED_ON = (
    "traceparent",
    "tracestate",
    "baggage",
    "endpoint-load-metrics-format",
    "x-amzn-sagemaker-session-id",
)
"""Headers of the client that engines are given: those of tracing, the one by which a load balancer asks for
ORCA's report, the session that an engine keeps for SageMaker's clients, and none that authenticates."""


def carried(span: Span) -> dict[str, str]:
    """The headers by which an engine's own spans come below this one."""
    headers: dict[str, str] = {}
    W3C.inject(headers, set_span_in_context(span))
    return headers
