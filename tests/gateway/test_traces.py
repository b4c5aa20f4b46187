"""A span per request, below the client's and above the engine's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gateway_stack import eventually, from_clients, running_gateway
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from gateway.telemetry import traces

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-agent-role": "summarizer", "x-session-id": "s1"}
HEADERS |= {"x-parent-session-id": "s0"}


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(traces, "get_tracer_provider", lambda: provider)
    yield exporter
    provider.shutdown()


async def finished(spans: InMemorySpanExporter, count: int = 1) -> tuple[ReadableSpan, ...]:
    async def there() -> bool:
        return len(spans.get_finished_spans()) == count

    await eventually(there)
    return spans.get_finished_spans()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_a_span(spans: InMemorySpanExporter, stream: bool) -> None:
    async with running_gateway() as stack:
        async with stack.post({"stream": stream}, headers=HEADERS) as response:
            await response.read()
        (span,) = await finished(spans)
        (engine,) = (e for e in stack.engines.values() if from_clients(e))
        assert span.name == "chat assistant"
        assert span.kind is SpanKind.SERVER
        assert span.context is not None
        assert span.parent is not None
        assert f"{span.context.trace_id:032x}" == TRACE
        assert f"{span.parent.span_id:016x}" == PARENT
        said = dict(span.attributes or {})
        assert said["gen_ai.operation.name"] == "chat"
        assert said["gen_ai.agent.name"] == "summarizer"
        assert said["gen_ai.conversation.id"] == "s1"
        assert said["tiercel.parent_session"] == "s0"
        assert said["gen_ai.request.model"] == "assistant"
        assert said["gen_ai.response.model"] == "assistant:int8"
        assert said["gen_ai.usage.output_tokens"] == stack.sample(
            "tiercel_tokens_total", role="summarizer", variant="int8", kind="completion"
        )
        assert said["tiercel.route_reason"] == "cheapest_in_budget"
        assert said["http.response.status_code"] == 200
        assert ("gen_ai.response.time_to_first_chunk" in said) is stream
        assert not any("how much" in str(value) for value in said.values()), "never a prompt"
        sent = engine.headers[0]["traceparent"]
        assert sent == f"00-{TRACE}-{span.context.span_id:016x}-01", "the engine's spans come below ours"


async def test_errors(spans: InMemorySpanExporter) -> None:
    async with running_gateway() as stack:
        for engine in stack.engines.values():
            engine.script.status = 500
        async with stack.post({"model": "gpt"}) as response:
            assert response.status == 404
        async with stack.post() as response:
            assert response.status == 502
        refused, failed = await finished(spans, 2)
    assert (refused.attributes or {})["error.type"] == "404"
    assert refused.status.status_code is StatusCode.UNSET, "the client's mistake is not ours"
    assert (failed.attributes or {})["error.type"] == "502"
    assert failed.status.status_code is StatusCode.ERROR


async def test_without_a_provider_the_clients_headers_pass() -> None:
    async with running_gateway() as stack:
        async with stack.post(headers=HEADERS) as response:
            await response.read()
        (engine,) = (e for e in stack.engines.values() if from_clients(e))
        assert engine.headers[0]["traceparent"] == HEADERS["traceparent"]
