"""Providers through LiteLLM: servers on this machine that speak their dialects, and LiteLLM's own mock.

Importing LiteLLM takes seconds, so these tests are one module. Each is run with answers that are listened
to (``sample_rate`` 1) and with such as pass unread (0), since those go through different readers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from dialects import CACHED_TOKENS, COMPLETION_TOKENS, PROMPT_TOKENS, WEATHER, ProviderServer
from gateway_stack import eventually, running_gateway
from openai_schema import CHUNK, EMBEDDINGS, WHOLE, check, need_schema
from provider_stack import (
    CLAUDE,
    DIALECTS,
    KEY,
    OLLAMA,
    OPENAI,
    OSLO,
    ROME,
    VLLM,
    Providers,
    provided,
)

from gateway.config import GatewaySettings
from gateway.errors import UpstreamError, UpstreamTimeoutError
from gateway.upstream.fake import FakeEngine
from gateway.upstream.litellm import LiteLLM
from gateway.upstream.providers.library import import_litellm


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Before a test's own time limits begin; and after somebody else, who left what is read only once."""
    import litellm

    litellm.REPEATED_STREAMING_CHUNK_LIMIT = 100
    import_litellm()


@pytest.fixture(params=[0.0, 1.0], ids=["unread", "sampled"])
async def providers(request: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Providers]:
    monkeypatch.setenv("PROVIDER_KEY", KEY)
    async with provided(quality={"sample_rate": request.param}) as running:
        yield running


@pytest.fixture
async def one(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Providers]:
    """Where the sample does not matter."""
    monkeypatch.setenv("PROVIDER_KEY", KEY)
    async with provided() as running:
        yield running


# answers


async def test_an_answer(providers: Providers) -> None:
    for model in DIALECTS:
        before = providers.tokens("prompt"), providers.tokens("completion")
        answer = await providers.whole(model, max_tokens=50)
        check(answer, WHOLE)
        message = answer["choices"][0]["message"]
        assert message["content"] == "It is a fine day."
        assert message["refusal"] is None
        assert answer["choices"][0]["logprobs"] is None
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["model"] == model
        assert answer["usage"]["total_tokens"] == PROMPT_TOKENS + COMPLETION_TOKENS
        if model != OLLAMA:  # which does not tell
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == CACHED_TOKENS
        assert providers.tokens("prompt") - before[0] == PROMPT_TOKENS
        assert providers.tokens("completion") - before[1] == COMPLETION_TOKENS
        labels = {"role": "core", "model": model, "variant": "provider", "kind": "prompt"}
        assert providers.stack.sample("tiercel_tokens_total", **labels) == PROMPT_TOKENS
    assert "large" in providers.server.requests[0]["model"]


async def test_a_stream_and_its_usage(providers: Providers) -> None:
    """The books have it whether or not the client asked for it, and the client has it only if it asked."""
    for model in DIALECTS:
        for asked in (False, True):
            before = providers.tokens("prompt"), providers.tokens("completion")
            options = {"stream_options": {"include_usage": True}} if asked else {}
            events = await providers.stream(model, **options)
            for event in events:
                check(event, CHUNK)
            with_choices = [event for event in events if event["choices"]]
            text = "".join(event["choices"][0]["delta"].get("content") or "" for event in with_choices)
            assert text == "It is a fine day."
            assert [e["choices"][0]["finish_reason"] for e in with_choices].count("stop") == 1
            assert len(events) - len(with_choices) == asked
            if asked:
                usage = events[-1]["usage"]
                assert usage["prompt_tokens"] == PROMPT_TOKENS
                assert usage["completion_tokens"] == COMPLETION_TOKENS
                if model != OLLAMA:
                    assert usage["prompt_tokens_details"]["cached_tokens"] == CACHED_TOKENS
            else:
                assert not any(event.get("usage") for event in events)
            await eventually(lambda b=before: providers.tokens("completion") - b[1] == COMPLETION_TOKENS)
            assert providers.tokens("prompt") - before[0] == PROMPT_TOKENS


async def test_tools(providers: Providers) -> None:
    """One call, and two at once; beside calls ``content`` is null, and there."""
    for model in DIALECTS:
        for calls in ((OSLO,), (OSLO, ROME)):
            providers.set(calls=calls)
            answer = await providers.whole(model, tools=[WEATHER], parallel_tool_calls=len(calls) > 1)
            check(answer, WHOLE)
            (choice,) = answer["choices"]
            assert choice["finish_reason"] == "tool_calls"
            assert choice["message"]["content"] is None or model == OLLAMA
            said = choice["message"]["tool_calls"]
            assert [call["type"] for call in said] == ["function"] * len(calls)
            assert len({call["id"] for call in said}) == len(calls)
            assert [call["function"]["name"] for call in said] == ["weather"] * len(calls)
            assert [json.loads(call["function"]["arguments"]) for call in said] == list(calls)
        assert "weather" in json.dumps(providers.server.requests[-1]["tools"])


async def test_streamed_tools(providers: Providers) -> None:
    for model in DIALECTS:
        for calls in ((OSLO,), (OSLO, ROME)):
            providers.set(calls=calls)
            events = await providers.stream(model, tools=[WEATHER], stream_options={"include_usage": True})
            found: dict[int, dict[str, str]] = {}
            for event in events:
                check(event, CHUNK)
                for choice in event["choices"]:
                    for part in choice["delta"].get("tool_calls") or ():
                        call = found.setdefault(part["index"], {"id": "", "name": "", "arguments": ""})
                        call["id"] += part.get("id") or ""
                        for field in ("name", "arguments"):
                            call[field] += part["function"].get(field) or ""
            assert [call["name"] for call in found.values()] == ["weather"] * len(calls), (model, events)
            assert [json.loads(call["arguments"]) for call in found.values()] == list(calls)
            assert len({call["id"] for call in found.values()}) == len(calls)
            assert [c["finish_reason"] for e in events for c in e["choices"]].count("tool_calls") == 1
            assert events[-1]["usage"]["completion_tokens"] == COMPLETION_TOKENS


async def test_the_schema_is_at_hand() -> None:
    """Says so where it is not; the other tests then see everything else."""
    need_schema()


async def test_a_second_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM engine elsewhere, as a provider."""
    monkeypatch.setenv("PROVIDER_KEY", KEY)
    engine = FakeEngine()
    async with engine.serving() as url:
        entry = {"model": "far", "litellm_model": "hosted_vllm/assistant", "api_base": url + "/v1"}
        async with running_gateway(providers=(entry,), quality={"sample_rate": 0.0}) as stack:
            far = Providers(stack, ProviderServer())
            answer = await far.whole("far", max_tokens=3)
            check(answer, WHOLE)
            assert answer["choices"][0]["message"]["content"] == "The total is"
            assert answer["choices"][0]["finish_reason"] == "length"
            events = await far.stream("far", logprobs=True, top_logprobs=2)
            for event in events:
                check(event, CHUNK)
            logprobs = events[0]["choices"][0]["logprobs"]["content"]
            assert [len(token["top_logprobs"]) for token in logprobs] == [2]
            assert logprobs[0]["top_logprobs"][1]["bytes"] is None


async def test_embeddings(one: Providers) -> None:
    body = {"model": OPENAI, "input": ["a", "bc"], "api_base": "http://127.0.0.1:1/v1"}
    async with one.stack.post(body, path="/v1/embeddings") as response:
        assert response.status == 200
        answer = await response.json()
    check(answer, EMBEDDINGS)
    assert [row["index"] for row in answer["data"]] == [0, 1]
    assert answer["data"][1]["embedding"] == [0.5, 2.0]
    assert answer["model"] == OPENAI
    for path in ("/v1/responses", "/v1/completions"):
        async with one.stack.post({"model": OPENAI, "input": "a", "prompt": "a"}, path=path) as response:
            assert response.status == 400
            assert "serves /v1/chat/completions and /v1/embeddings only" in await response.text()


# what a client asks for


async def test_parameters_of_openai_reach_it(one: Providers) -> None:
    wanted = {
        "frequency_penalty": 0.1,
        "logit_bias": {"7": 1},
        "max_completion_tokens": 9,
        "metadata": {"x": "y"},
        "n": 1,
        "parallel_tool_calls": False,
        "presence_penalty": 0.1,
        "prompt_cache_key": "k",
        "response_format": {"type": "json_object"},
        "safety_identifier": "s",
        "seed": 3,
        "service_tier": "auto",
        "stop": ["x"],
        "temperature": 0.4,
        "tool_choice": "auto",
        "tools": [WEATHER],
        "top_p": 0.9,
    }
    await one.whole(OPENAI, **wanted)
    sent = one.server.requests[-1]
    assert {name: sent.get(name) for name in wanted if name != "metadata"} == {
        name: value for name, value in wanted.items() if name != "metadata"
    }
    assert "metadata" not in sent


async def test_a_parameter_that_the_provider_does_not_know_is_left_out(one: Providers) -> None:
    await one.whole(CLAUDE, seed=3, frequency_penalty=0.5, temperature=0.5, made_up=1)
    sent = one.server.requests[-1]
    assert sent["temperature"] == 0.5
    assert not sent.keys() & {"seed", "frequency_penalty", "made_up"}


async def test_clients_cannot_redirect_or_fake(one: Providers) -> None:
    stolen = {
        "api_base": "http://127.0.0.1:1/v1",
        "base_url": "http://127.0.0.1:1/v1",
        "api_key": "x",
        "custom_llm_provider": "anthropic",
        "extra_body": {"made_up": 1},
        "extra_headers": {"x-made-up": "1"},
        "fallbacks": ["openai/other"],
        "headers": {"x-made-up": "1"},
        "metadata": {"tags": ["x"]},
        "mock_response": "fake",
        "mock_tool_calls": [],
        "made_up": 1,
        "num_retries": 3,
        "timeout": 0.001,
    }
    for model in DIALECTS:
        answer = await one.whole(model, **stolen)
        assert answer["choices"][0]["message"]["content"] == "It is a fine day."
    assert len(one.server.requests) == len(DIALECTS)
    for sent in one.server.requests:
        assert "made_up" not in json.dumps(sent)
    assert all("x-made-up" not in headers for headers in one.server.headers)
    # LiteLLM itself would fetch tools from where such a one says.
    for tool in ({"type": "mcp", "server_url": "litellm_proxy", "server_label": "x"}, 7, {}):
        status, error, _ = await one.failed(OPENAI, tools=[WEATHER, tool])
        assert (status, error["param"]) == (400, "tools[1]")
    assert len(one.server.requests) == len(DIALECTS)


# coming and going


async def test_a_client_that_leaves(providers: Providers) -> None:
    """Before anything has come, and in the middle of it."""
    server = providers.server
    for model in (OPENAI, VLLM, CLAUDE):
        for stream in (False, True):
            providers.set(delay_s=60)
            aborted = server.aborted
            request = asyncio.ensure_future(
                providers.stack.post({"model": model, "stream": stream}).__aenter__()
            )
            await eventually(lambda: server.running == 1)
            request.cancel()
            await eventually(lambda: server.running == 0)
            assert server.aborted == aborted + 1
        providers.set(chunk_delay_s=0.3, text="a b c d e f g h i j k l m n o p")
        aborted = server.aborted
        response = await providers.stack.post({"model": model, "stream": True})
        await response.content.readany()
        response.close()
        await eventually(lambda s=server, a=aborted: s.aborted == a + 1)
        assert server.running == 0
    assert providers.requests("499") == 9
    pools = providers.stack.gateway.plane.snapshot.pools.providers
    assert all(pool.in_flight == 0 for pool in pools.values())


async def test_a_slow_client_holds_the_provider_back(one: Providers) -> None:
    one.set(endless=True, text="x" * 20_000)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(one.stack.url.rpartition(":")[2]))
    body = json.dumps({"model": OPENAI, "stream": True, "messages": [{"role": "user", "content": "x"}]})
    lines = ["POST /v1/chat/completions HTTP/1.1", "host: x", "content-type: application/json"]
    head = "\r\n".join([*lines, f"content-length: {len(body)}", "", ""])
    writer.write((head + body).encode())
    try:
        await reader.readexactly(1000)
        seen = -1
        async with asyncio.timeout(60):
            while seen != one.server.sent:  # until nothing moves any more
                seen = one.server.sent
                await asyncio.sleep(1.0)
        assert seen * 20_000 < 64 << 20
        for _ in range(100):
            await reader.readexactly(100_000)
        await eventually(lambda: one.server.sent > seen)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    await eventually(lambda: one.server.running == 0)


# what has no exchange


async def test_once(one: Providers) -> None:
    """As a judge is asked."""
    providers = one.stack.gateway.providers
    body = {"messages": [{"role": "user", "content": "x"}], "mock_response": "fake"}
    for model in DIALECTS:
        answer = await providers.once(model, body)
        assert answer["choices"][0]["message"]["content"] == "It is a fine day."
    one.set(status=500)
    with pytest.raises(UpstreamError, match="failed with status 500"):
        await providers.once(OPENAI, body)
    with pytest.raises(UpstreamError, match="no longer configured"):
        await providers.once("removed", body)


async def test_once_in_time(one: Providers) -> None:
    one.set(delay_s=60)
    entry = one.stack.gateway.plane.snapshot.config.providers[0]
    alone = LiteLLM([entry], GatewaySettings(answer_timeout_s=0.3))
    await alone.load()
    with pytest.raises(UpstreamTimeoutError):
        await alone.once(OPENAI, {"messages": [{"role": "user", "content": "x"}]})
    await eventually(lambda: one.server.running == 0)
    await alone.close()
