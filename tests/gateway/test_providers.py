"""Providers through LiteLLM. One module, since importing LiteLLM takes seconds."""

from __future__ import annotations

import asyncio
import json

import pytest
from gateway_stack import Stack, eventually, make_config, running_gateway

from gateway.app import Gateway
from gateway.upstream.fake import FakeEngine


async def test_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    """One gateway for all of it; each step is a request that a user would make."""
    monkeypatch.setenv("HOSTED_KEY", "sk-secret")
    hosted = FakeEngine()
    async with hosted.serving() as url:
        provider = {
            "model": "hosted",
            "litellm_model": "openai/hosted-large",
            "api_base": url + "/v1",
            "api_key_env": "HOSTED_KEY",
        }
        async with running_gateway(providers=(provider,)) as stack:
            await whole(stack, hosted)
            await streamed(stack, hosted)
            await clients_cannot_redirect(stack, hosted)
            await failures(stack, hosted)
            await leaving(stack, hosted)
            await embeddings(stack, hosted)


async def whole(stack: Stack, hosted: FakeEngine) -> None:
    async with stack.post({"model": "hosted", "max_tokens": 3}) as response:
        assert response.status == 200
        assert response.headers["x-tiercel-variant"] == "provider"
        assert response.headers["x-tiercel-replica"] == "hosted"
        assert response.headers["x-tiercel-route-reason"] == "provider"
        answer = await response.json()
    assert answer["choices"][0]["message"]["content"] == "The total is"
    assert answer["model"] == "hosted"
    assert hosted.requests[-1]["model"] == "hosted-large"
    assert "logprobs" not in hosted.requests[-1]
    assert stack.sample("tiercel_tokens_total", role="core", variant="provider", kind="completion") == 3


async def streamed(stack: Stack, hosted: FakeEngine) -> None:
    for wanted in (False, True):
        options = {"stream_options": {"include_usage": True}} if wanted else {}
        async with stack.post({"model": "hosted", "stream": True, **options}) as response:
            *events, done = await stack.events(response)
        assert done == "[DONE]"
        text = [e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"]]
        assert "".join(text) == "The total is $277."
        assert any(event.get("usage") for event in events) == wanted
    await eventually(
        lambda: stack.sample("tiercel_tokens_total", role="core", variant="provider", kind="completion") == 11
    )


async def clients_cannot_redirect(stack: Stack, hosted: FakeEngine) -> None:
    before = len(hosted.requests)
    stolen = {"api_base": "http://127.0.0.1:1/v1", "mock_response": "fake", "api_key": "x", "fallbacks": []}
    async with stack.post({"model": "hosted", "made_up": 1, **stolen}) as response:
        assert (await response.json())["choices"][0]["message"]["content"] == "The total is $277."
    assert len(hosted.requests) == before + 1


async def failures(stack: Stack, hosted: FakeEngine) -> None:
    for status, seen in ((400, 400), (429, 429), (401, 502), (404, 502), (500, 502)):
        hosted.script.status = status
        for stream in (False, True):
            before = len(hosted.requests)
            async with stack.post({"model": "hosted", "stream": stream}) as response:
                text = await response.text()
                assert response.status == seen, (status, stream, text)
                assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
                assert "sk-secret" not in text
                assert "Traceback" not in text
            assert len(hosted.requests) == before + 1, "nothing that reached a provider is retried"
    hosted.script.status = 200
    hosted.script.token_delay_s, hosted.script.die_after = 0.02, 2
    async with stack.post({"model": "hosted", "stream": True}) as response:
        assert response.status == 200
        assert (await stack.events(response))[-1]["error"]["type"] == "upstream_error"
    hosted.script.token_delay_s, hosted.script.die_after = 0, None
    async with stack.post({"model": "hosted", "prompt": "hi"}, path="/v1/completions") as response:
        assert response.status == 400


async def embeddings(stack: Stack, hosted: FakeEngine) -> None:
    hosted.script.first_token_delay_s = 0
    body = {"model": "hosted", "input": ["a", "b"], "api_base": "http://127.0.0.1:1/v1"}
    async with stack.post(body, path="/v1/embeddings") as response:
        assert response.status == 200
        answer = await response.json()
    assert [one["index"] for one in answer["data"]] == [0, 1]
    assert len(answer["data"][0]["embedding"]) == 4
    assert hosted.requests[-1]["input"] == ["a", "b"]
    async with stack.post({"model": "hosted", "input": "a"}, path="/v1/responses") as response:
        assert response.status == 400
        assert "serves /v1/chat/completions and /v1/embeddings only" in await response.text()


async def leaving(stack: Stack, hosted: FakeEngine) -> None:
    await eventually(lambda: hosted.running == 0)
    hosted.aborted = 0
    hosted.script.first_token_delay_s = 30
    for stream in (False, True):
        request = asyncio.ensure_future(stack.post({"model": "hosted", "stream": stream}).__aenter__())
        await eventually(lambda: hosted.running)
        request.cancel()
        await eventually(lambda: hosted.running == 0)
    hosted.script.first_token_delay_s, hosted.script.token_delay_s = 0, 0.3
    response = await stack.post({"model": "hosted", "stream": True})
    await response.content.readany()
    response.close()
    await eventually(lambda: hosted.running == 0)
    assert hosted.aborted == 3
    assert stack.requests("499") == 3


def test_without_providers_litellm_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "litellm", raising=False)
    Gateway(make_config(), {})
    assert "litellm" not in sys.modules
