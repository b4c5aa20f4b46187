"""Whatever a client sends, it learns in OpenAI's envelope which field is wrong and what to do."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest
from gateway_stack import CHAT, Stack, eventually, from_clients, running_gateway

from gateway.errors import MOST_NAMES
from gateway.identity import hash_of

BAD_BODIES = [
    ({"model": 3}, 400, "model", "is a number (3); send a model id as a string"),
    ({"model": []}, 400, "model", "is an array; send a model id"),
    ({"model": "gpt-4"}, 404, "model", "use one of: assistant, "),
    ({"model": "assistant:int8"}, 403, "model", "is assistant:bf16"),
    ({"stream": "maybe"}, 400, "stream", 'is a string ("maybe"); send true or false'),
    ({"stream": 2}, 400, "stream", "is a number (2)"),
    ({"stream": {}}, 400, "stream", "is an object"),
    ({"stream": True, "stream_options": []}, 400, "stream_options", "is an array; send an object such as"),
    (
        {"stream": True, "stream_options": {"include_usage": "perhaps"}},
        400,
        "stream_options.include_usage",
        "send true or false",
    ),
]
"""What the gateway has to read itself and vLLM cannot read either; all else is the engine's to judge."""
BAD_TEXTS = [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"[]", "is an array; send a JSON object"),
    (b'{"temperature": nan}', "not valid JSON"),
    (b"\xff\xfe{", "not valid JSON"),
    (b'{"model": "\xff"}', "not valid JSON"),
    (b'{"n": ' + b"1" * 5000 + b"}", "n: Exceeds the limit"),
    (b"[" * 100_000, "is an array"),
    (b'{"model": ' + b"[" * 100_000, "nested too deeply"),
]


async def envelope(response: aiohttp.ClientResponse) -> dict[str, object]:
    assert response.headers["x-request-id"]
    text = await response.text()
    assert "Traceback" not in text
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def test_bad_input(stack: Stack) -> None:
    for body, status, param, says in BAD_BODIES:
        async with stack.post(body) as response:
            error = await envelope(response)
            assert (response.status, error["param"]) == (status, param), body
            assert says in error["message"], body
    for raw, says in BAD_TEXTS:
        headers = {"content-type": "application/json"}
        async with stack.http.post(stack.url + CHAT, data=raw, headers=headers) as response:
            assert response.status == 400
            assert says in (await envelope(response))["message"]
    assert not any(engine.requests for engine in stack.engines.values()), "bad input costs no engine time"
    assert stack.requests("400") == sum(status == 400 for _, status, _, _ in BAD_BODIES) + len(BAD_TEXTS)
    assert stack.sample(
        "tiercel_requests_total", role="other", requested="other", model="none", variant="none", outcome="400"
    )


async def test_bad_headers_and_paths(stack: Stack) -> None:
    async with stack.post(headers={"x-agent-role": "boss"}) as response:
        assert response.status == 400
        assert (await envelope(response))["param"] == "x-agent-role"
    async with stack.http.post(stack.url + CHAT, data="{}", headers={"content-type": "text/plain"}) as r:
        assert r.status == 400, "a form or script of a web page can post this type to a local port"
        assert (await envelope(r))["param"] == "content-type"
    async with stack.http.get(stack.url + CHAT) as response:
        assert response.status == 405
        await envelope(response)
    async with stack.http.delete(stack.url + "/admin/config") as response:
        assert response.status == 405
        assert response.headers["allow"] == "GET, HEAD, PUT"
        await envelope(response)
    async with stack.http.get(stack.url + "/v1/nothing") as response:
        assert response.status == 404
        assert "known are /v1/chat/completions, " in (await envelope(response))["message"]


async def test_body_too_large() -> None:
    async with running_gateway(gateway={"max_body_bytes": 2048}) as stack:
        text = [{"role": "user", "content": "x" * 4096}]
        async with stack.post({"messages": text}) as response:
            assert response.status == 413
            message = (await envelope(response))["message"]
            assert "2048 bytes" in message
            assert "gateway.max_body_bytes" in message

        async def chunked() -> object:
            for _ in range(64):
                yield b"x" * 1024

        headers = {"content-type": "application/json"}
        async with stack.http.post(stack.url + CHAT, data=chunked(), headers=headers) as response:
            assert response.status == 413


async def test_what_openai_clients_send_is_accepted(stack: Stack) -> None:
    extra = {
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "safety_identifier": "s",
        "verbosity": "low",
        "parallel_tool_calls": True,
        "reasoning_effort": "low",
        "max_completion_tokens": 3,
        "max_tokens": None,
        "temperature": 0,
        "something_new": [1],
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": None, "tool_calls": []},
            {"role": "tool", "content": "5", "tool_call_id": "x"},
        ],
    }
    async with stack.post(extra) as response:
        assert response.status == 200
    (sent,) = stack.asked("bf16")
    assert {key: sent[key] for key in extra} == extra


async def test_engine_failures(stack: Stack) -> None:
    script = stack.engines["bf16"].script
    for stream in (False, True):
        script.status, script.message = 400, "This model's maximum context length is 1024 tokens."
        async with stack.post({"stream": stream}) as response:
            assert response.status == 400, "the client's own mistake passes"
            assert (await envelope(response))["message"] == script.message
        script.status = 500
        async with stack.post({"stream": stream}) as response:
            assert response.status == 502
            error = await envelope(response)
            assert "status 500" in error["message"]
            assert "scripted" not in error["message"], "an engine's internals stay in the log"
        script.status, script.garbage = 200, True
        async with stack.post({"stream": stream}) as response:
            assert response.status == 502
            await envelope(response)
        script.garbage = False
        async with stack.post() as response:
            assert response.status == 200


async def test_timeouts() -> None:
    limits = {"first_byte_timeout_s": 1.5, "idle_timeout_s": 1.5}
    async with running_gateway(gateway=limits) as stack:
        engine = stack.engines["bf16"]
        engine.script.first_token_delay_s = 60
        async with stack.post({"stream": True}) as response:
            assert response.status == 504
            assert "1.5 s" in (await envelope(response))["message"]
        engine.script.first_token_delay_s, engine.script.token_delay_s = 0, 60
        async with stack.post({"stream": True}) as response:
            assert response.status == 200
            events = await stack.events(response)
        assert events[0]["choices"][0]["delta"]["content"] == "The"
        assert events[-1]["error"]["code"] == "upstream_timeout"
        assert stack.requests("504") == 2
        await eventually(lambda: engine.running == 0)
        assert engine.aborted == 2


@pytest.mark.parametrize("fault", ["die_after", "error_after"])
async def test_a_stream_that_breaks_off_ends_with_an_error_event(stack: Stack, fault: str) -> None:
    engine = stack.engines["bf16"]
    engine.script.token_delay_s = 0.02
    setattr(engine.script, fault, 2)
    async with stack.post({"stream": True}) as response:
        assert response.status == 200
        events = await stack.events(response)
    assert [event["choices"][0]["delta"]["content"] for event in events[:2]] == ["The", " total"]
    assert events[2]["error"]["type"] == "upstream_error"
    assert len(events) == 3, "no [DONE], and nothing is retried"
    assert len(from_clients(engine)) == 1
    assert stack.requests("502") == 1
    tokens = stack.sample("tiercel_tokens_total", role="core", variant="bf16", kind="completion")
    assert tokens == 2, "what a broken stream used is on the books"


async def test_an_engine_that_dies_in_prefill_is_a_502(stack: Stack) -> None:
    stack.engines["bf16"].script.die_after = 0
    for stream in (False, True):
        async with stack.post({"stream": stream}) as response:
            assert response.status == 502
            await envelope(response)


async def test_no_error_lists_every_name_there_is() -> None:
    """A fleet may have thousands of roles; whoever misspells one is told of a few."""
    names = [f"role-{number}" for number in range(500)]
    roles: dict[str, Any] = {name: {} for name in ("core", *names)}
    keys = [
        {"name": "all", "sha256": hash_of("sk-all")},
        {"name": "roles", "sha256": hash_of("sk-roles"), "roles": names[100:]},
        {"name": "models", "sha256": hash_of("sk-models"), "models": names},
    ]
    async with running_gateway(roles=roles, keys=keys) as stack:
        for who, headers, status, known in (
            ("all", {}, 404, 505),
            ("all", {"x-agent-role": "nobody"}, 400, 501),
            ("roles", {"x-agent-role": "role-100"}, 404, 404),
            ("roles", {}, 403, 400),
            ("models", {}, 403, 500),
        ):
            sent = {"authorization": f"Bearer sk-{who}"} | headers
            async with stack.post({"model": "gpt-4"}, headers=sent) as response:
                said = (await response.json())["error"]["message"]
                assert response.status == status, said
            assert said.endswith(f" and {known - MOST_NAMES} more"), said
            assert len(said) < 300
            if who == "roles" and status == 404:
                assert "role-99," not in said, "it may not use this one"
        sent = {"authorization": "Bearer sk-all"}
        async with stack.http.get(stack.url + "/v1/models/gpt-4", headers=sent) as response:
            assert (await response.json())["error"]["message"].endswith(f" and {505 - MOST_NAMES} more")
