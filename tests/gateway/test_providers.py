"""Providers through LiteLLM: servers on this machine that speak their dialects, and LiteLLM's own mock.

Importing LiteLLM takes seconds, so these tests are one module. Each is run with answers that are listened
to (``sample_rate`` 1) and with such as pass unread (0), since those go through different readers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import formatdate
from typing import Any

import aiohttp
import pytest
from dialects import CACHED_TOKENS, COMPLETION_TOKENS, PROMPT_TOKENS, WEATHER, ProviderServer, Script
from gateway_stack import Stack, eventually, running_gateway
from openai_schema import CHUNK, EMBEDDINGS, WHOLE, check, need_schema

from gateway.app import Gateway
from gateway.config import GatewaySettings, Provider
from gateway.errors import UpstreamError, UpstreamTimeoutError
from gateway.upstream.fake import FakeEngine
from gateway.upstream.litellm import LiteLLM
from gateway.upstream.providers.library import import_litellm

KEY = "sk-very-secret-0123456789"
PASSWORD = "hunter2"
OPENAI, VLLM, CLAUDE, OLLAMA, GEMINI = "gpt", "mine", "claude", "llama", "gemini"
DIALECTS = (OPENAI, VLLM, CLAUDE, OLLAMA, GEMINI)
OSLO, ROME = {"city": "Oslo"}, {"city": "Rome"}


class Providers:
    """A gateway in front of a server of all dialects."""

    def __init__(self, stack: Stack, server: ProviderServer) -> None:
        self.stack = stack
        self.server = server

    def set(self, **how: Any) -> None:
        self.server.script = Script(**how)
        self.server.requests.clear()

    async def whole(self, model: str, **more: Any) -> Any:
        async with self.stack.post({"model": model, **more}) as response:
            text = await response.text()
            assert response.status == 200, (model, text)
            return json.loads(text)

    async def stream(self, model: str, **more: Any) -> list[Any]:
        """All events but the last one, which is ``[DONE]``."""
        async with self.stack.post({"model": model, "stream": True, **more}) as response:
            assert response.status == 200, (model, await response.text())
            *events, done = await self.stack.events(response)
        assert done == "[DONE]", (events, done)
        return events

    async def failed(self, model: str, **more: Any) -> tuple[int, Any, Any]:
        """Status, error and headers."""
        async with self.stack.post({"model": model, **more}) as response:
            text = await response.text()
            error = json.loads(text)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert "Traceback" not in text
            return response.status, error, response.headers

    def tokens(self, kind: str) -> float:
        return self.stack.sample("tiercel_tokens_total", role="core", variant="provider", kind=kind)

    def requests(self, outcome: str) -> float:
        return self.stack.requests(outcome)


def entries(url: str) -> tuple[dict[str, Any], ...]:
    def entry(model: str, name: str, base: str) -> dict[str, Any]:
        return {"model": model, "litellm_model": name, "api_base": base, "api_key_env": "PROVIDER_KEY"}

    return (
        entry(OPENAI, "openai/gpt-large", url + "/v1"),
        entry(VLLM, "hosted_vllm/large", url + "/v1"),
        entry(CLAUDE, "anthropic/claude-large", url),
        entry(OLLAMA, "ollama_chat/llama-large", url),
        entry(GEMINI, "gemini/gemini-large", url + "/v1beta"),
    )


@asynccontextmanager
async def provided(**changes: Any) -> AsyncIterator[Providers]:
    server = ProviderServer()
    async with server.serving() as url, running_gateway(providers=entries(url), **changes) as stack:
        yield Providers(stack, server)


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Before a test's own time limits begin."""
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


# failures

SEEN = {
    400: 400,
    401: 502,
    402: 502,
    403: 502,
    404: 502,
    408: 504,
    409: 409,
    413: 413,
    422: 422,
    429: 429,
    500: 502,
    502: 502,
    503: 503,
    504: 504,
    529: 503,
}


async def test_the_providers_status(providers: Providers) -> None:
    for model in DIALECTS:
        for status, seen in SEEN.items():
            for stream in (False, True):
                providers.set(status=status, headers={"retry-after": "37"})
                got, error, headers = await providers.failed(model, stream=stream)
                assert got == seen, (model, status, stream, error)
                assert len(providers.server.requests) == 1, "what reached a provider is not asked again"
                assert headers.get("retry-after") == (
                    "37" if seen in (400, 409, 413, 422, 429, 503) else None
                )
                if seen < 500:
                    assert error["message"] == "scripted failure"
            # Its errors are not what this test is about.
            providers.stack.gateway.plane.snapshot.pools.providers[model].breaker.answered()


async def test_a_content_policy_is_about_the_request(one: Providers) -> None:
    said = {"error": {"message": "flagged by moderation", "code": "content_policy_violation"}}
    one.set(status=403, error=said)
    status, error, _ = await one.failed(OPENAI)
    assert (status, error["code"]) == (403, "content_policy_violation")


@pytest.mark.parametrize(
    ("headers", "seconds", "milliseconds"),
    [
        ([("retry-after", "7")], "7", None),
        ([("retry-after", "1.2")], "2", None),
        ([("retry-after-ms", "1500")], "2", "1500"),
        ([("retry-after-ms", "1500"), ("retry-after", "3")], "3", "1500"),
        ([("retry-after", "7"), ("retry-after", "9")], "7", None),
        ([("retry-after", "soon"), ("retry-after", "9")], "9", None),
        ([("retry-after", "-4")], None, None),
        ([("retry-after", "1e400")], None, None),
        ([("retry-after", "9" * 5000)], None, None),
        ([("retry-after", "")], None, None),
        ([("retry-after", "99999999999")], "86400", None),
        ([("retry-after", "Thu, 99 Foo 2026 00:00:00 GMT"), ("retry-after-ms", "nan")], None, None),
        ([("retry-after", formatdate(0, usegmt=True))], "0", None),
    ],
)
async def test_the_wait(one: Providers, headers: Any, seconds: str | None, milliseconds: str | None) -> None:
    for status in (429, 503):
        one.set(status=status, headers=headers)
        for stream in (False, True):
            got, _, answered = await one.failed(OPENAI, stream=stream)
            assert got == status
            assert answered.get("retry-after") == seconds
            assert answered.get("retry-after-ms") == milliseconds


async def test_the_wait_as_a_date(one: Providers) -> None:
    one.set(status=429, headers={"retry-after": formatdate(time.time() + 1000, usegmt=True)})
    _, _, headers = await one.failed(OPENAI)
    assert 900 < int(headers["retry-after"]) <= 1001


async def test_what_is_no_answer(providers: Providers) -> None:
    for model in DIALECTS:
        for stream in (False, True):
            for how in ({"garbage": True}, {"die_after": 0}):
                providers.set(**how)
                status, error, _ = await providers.failed(model, stream=stream)
                assert (status, error["type"]) == (502, "upstream_error"), (model, stream, how)
        providers.stack.gateway.plane.snapshot.pools.providers[model].breaker.answered()


async def test_half_a_stream(providers: Providers) -> None:
    """Cut off, or merely at an end too early: LiteLLM says ``stop`` in the provider's place."""
    for model in DIALECTS:
        providers.set(die_after=3, chunk_delay_s=0.01, text="a b c d e f g h")
        async with providers.stack.post({"model": model, "stream": True}) as response:
            assert response.status == 200
            events = await providers.stack.events(response)
        assert "error" in events[-1], (model, events)
        assert not any(c["finish_reason"] for e in events[:-1] for c in e["choices"])
        if model == GEMINI:  # whose dialect has no end but this
            continue
        providers.set(end_after=4, text="a b c d e f g h")
        async with providers.stack.post({"model": model, "stream": True}) as response:
            events = await providers.stack.events(response)
        assert "error" in events[-1], (model, events)
        providers.stack.gateway.plane.snapshot.pools.providers[model].breaker.answered()


async def test_a_provider_that_is_not_there(one: Providers) -> None:
    gone = {"model": "gone", "litellm_model": "openai/x", "api_base": "http://127.0.0.1:9/v1"}
    async with running_gateway(providers=(gone,)) as stack:
        status, error, _ = await Providers(stack, one.server).failed("gone")
        assert status == 502
        assert "cannot be reached" in error["message"]
        assert not stack.gateway.plane.snapshot.pools.providers["gone"].breaker.closed


async def test_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROVIDER_KEY", KEY)
    limits = {"first_byte_timeout_s": 0.6, "idle_timeout_s": 0.6}
    async with provided(gateway=limits) as providers:
        for model in (OPENAI, CLAUDE):
            for stream in (False, True):
                providers.set(delay_s=60)
                assert (await providers.failed(model, stream=stream))[0] == 504
            providers.set(silent_after=4)
            async with providers.stack.post({"model": model, "stream": True}) as response:
                assert response.status == 200
                events = await providers.stack.events(response)
            assert events[-1]["error"]["code"] == "upstream_timeout"
            await eventually(lambda: providers.server.running == 0)
            providers.stack.gateway.plane.snapshot.pools.providers[model].breaker.answered()


async def test_our_settings_and_a_full_provider_are_no_reason_to_refuse_others(one: Providers) -> None:
    breaker = one.stack.gateway.plane.snapshot.pools.providers[OPENAI].breaker
    for status in (401, 404, 429, 503, 400):
        for _ in range(4):
            one.set(status=status)
            assert (await one.failed(OPENAI))[0] == SEEN[status]
            assert breaker.closed
    one.set()
    await one.whole(OPENAI)
    for _ in range(3):
        one.set(status=500)
        assert (await one.failed(OPENAI))[0] == 502
    assert not breaker.closed


# secrets


async def test_secrets_stay_here(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A provider that says what it was sent: the key is in its words, and nowhere else."""
    monkeypatch.setenv("PROVIDER_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    server = ProviderServer()
    async with server.serving() as url:
        base = url.replace("http://", f"http://someone:{PASSWORD}@")
        entry = {"litellm_model": "openai/x", "api_base": base + "/v1"}
        keyed = entry | {"model": "keyed", "api_base": url + "/v1", "api_key_env": "PROVIDER_KEY"}
        listed = (keyed, entry | {"model": "basic"})
        assert PASSWORD not in repr([Provider.model_validate(one) for one in listed])
        async with running_gateway(providers=listed) as stack:
            for status in (400, 401, 403, 404, 422, 429, 500, 503):
                said = {"error": {"message": "you sent {authorization}", "code": "{authorization}"}}
                server.script = Script(status=status, error=said)
                for model in ("keyed", "basic"):
                    for stream in (False, True):
                        async with stack.post({"model": model, "stream": stream}) as response:
                            seen = await response.text() + str(response.headers)
                        for secret in (KEY, PASSWORD, base, "c29tZW9uZTpodW50ZXIy"):
                            assert secret not in seen, (status, model)
            async with stack.http.get(stack.url + "/metrics") as response:
                metrics = await response.text()
            records = caplog.text + "".join(str(record.__dict__) for record in caplog.records)
        assert any(KEY in str(headers) for headers in server.headers)
    ours = [r for r in caplog.records if r.name.startswith(("tiercel", "gateway"))]
    for secret in (KEY, PASSWORD):
        assert secret not in metrics
        assert not [r for r in ours if secret in str(r.__dict__)]
    assert KEY not in records


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
        async with asyncio.timeout(20):
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
    alone = LiteLLM([entry], GatewaySettings(first_byte_timeout_s=0.3))
    await alone.load()
    with pytest.raises(UpstreamTimeoutError):
        await alone.once(OPENAI, {"messages": [{"role": "user", "content": "x"}]})
    await eventually(lambda: one.server.running == 0)
    await alone.close()


# LiteLLM's own mock


@pytest.fixture
async def mocked(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Providers, dict[str, Any]]]:
    """A gateway whose LiteLLM answers by itself, as ``mock`` says; no client can have it do that."""
    entry = {"model": "mock", "litellm_model": "openai/gpt-4o"}
    mock: dict[str, Any] = {}
    async with running_gateway(providers=(entry,), quality={"sample_rate": 0.0}) as stack:
        module: Any = sys.modules["litellm"]
        complete = module.acompletion

        async def mocked_complete(**given: Any) -> Any:
            answer = await complete(**given, **mock)
            if given.get("stream"):  # of which the mock never says that it is complete
                answer.received_finish_reason = "stop"
            return answer

        monkeypatch.setattr(module, "acompletion", mocked_complete)
        yield Providers(stack, ProviderServer()), mock


async def test_litellms_own_mock(mocked: tuple[Providers, dict[str, Any]]) -> None:
    providers, mock = mocked
    mock["mock_response"] = "Said by nobody."
    answer = await providers.whole("mock")
    check(answer, WHOLE)
    assert answer["choices"][0]["message"]["content"] == "Said by nobody."
    events = await providers.stream("mock", stream_options={"include_usage": True})
    for event in events:
        check(event, CHUNK)
    said = [c["delta"].get("content") or "" for e in events for c in e["choices"]]
    assert "".join(said) == "Said by nobody."
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    mock.update(mock_tool_calls=[{"id": "call_1", "type": "function", "function": function}])
    answer = await providers.whole("mock", tools=[WEATHER])
    check(answer, WHOLE)
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"] == function
    mock.clear()
    for said_error, status in (
        ("litellm.RateLimitError", 429),
        ("litellm.ContextWindowExceededError", 400),
        ("litellm.InternalServerError", 502),
    ):
        mock["mock_response"] = said_error
        got, _, _ = await providers.failed("mock")
        assert got == status, said_error


# LiteLLM itself


def test_without_providers_litellm_is_not_imported() -> None:
    """In a process of its own, since others here import it."""
    code = (
        "import sys; sys.path.insert(0, 'tests/gateway'); import gateway_stack as g; "
        "from gateway.app import Gateway; Gateway(g.make_config(), {}); print('litellm' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


async def test_the_loop_goes_on_while_a_provider_blocks_litellms(one: Providers) -> None:
    """Whatever LiteLLM waits for over a blocking connection, other clients do not."""
    library = one.stack.gateway.providers._library
    library.start_soon(_blocks(1.0))
    async with asyncio.timeout(0.8), aiohttp.ClientSession() as session:
        for _ in range(3):
            async with session.post(
                one.stack.url + "/v1/chat/completions",
                json={"model": "assistant", "messages": [{"role": "user", "content": "x"}]},
            ) as response:
                assert response.status == 200


async def _blocks(seconds: float) -> None:
    time.sleep(seconds)  # noqa: ASYNC251  that is what it is about


def test_gateways_come_and_go() -> None:
    """Loops of their own, one after the other: nothing of the last one's is used again."""

    async def once() -> None:
        server = ProviderServer()
        async with server.serving() as url:
            entry = {"model": "m", "litellm_model": "openai/x", "api_base": url + "/v1"}
            async with running_gateway(providers=(entry,)) as stack:
                await Providers(stack, server).whole("m")
                gateway: Gateway = stack.gateway
            assert gateway.providers._library._thread is None

    for _ in range(2):
        asyncio.run(once())
