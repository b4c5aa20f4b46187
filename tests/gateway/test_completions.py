"""The hot path with a real client on a real socket."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from gateway_stack import CHAT, Stack, addresses, eventually, from_clients, running_gateway

from gateway.config import Quality
from gateway.errors import BadRequestError
from gateway.proxy.body import Body
from gateway.telemetry.logs import AccessLog, LogWriter
from gateway.upstream.options import OutputOptions, changes_for_engine


async def test_headers_say_what_was_decided(stack: Stack) -> None:
    for body in ({"model": "intent_classifier"}, {"model": "intent_classifier", "stream": True}):
        async with stack.post(body, headers={"x-request-id": "my-id.1"}) as response:
            assert response.status == 200
            assert response.headers["x-request-id"] == "my-id.1"
            assert response.headers["x-tiercel-variant"] == "assistant:int4-kv8"
            assert response.headers["x-tiercel-replica"] == "assistant:int4-kv8-0"
            assert response.headers["x-tiercel-route-reason"] == "cheapest_in_budget"
    async with stack.post(headers={"x-request-id": "bad id\t"}) as response:
        assert len(response.headers["x-request-id"]) == 32
    assert stack.asked("int4-kv8")[0]["model"] == "assistant", "engines know the model only"


async def test_stream_is_not_buffered(stack: Stack) -> None:
    """A client has every token of an engine that writes no more for now."""
    for written in (1, 2, 3):
        stack.engines["bf16"].script.stall_after = written
        async with asyncio.timeout(25), stack.post({"stream": True}) as response:
            for _ in range(written):
                event = await response.content.readuntil(b"\n\n")
                assert json.loads(event.removeprefix(b"data: "))["choices"][0]["delta"]["content"]


async def test_usage_is_shown_only_when_asked_for(stack: Stack) -> None:
    for options in (None, {"include_usage": False}, {"include_usage": True}):
        async with stack.post({"stream": True, "stream_options": options}) as response:
            *events, done = await stack.events(response)
        assert done == "[DONE]"
        wanted = bool(options and options["include_usage"])
        assert [bool(event.get("usage")) for event in events] == [False] * 4 + [True] * wanted
        assert stack.asked("bf16")[-1]["stream_options"]["include_usage"] is True
    assert stack.sample("tiercel_tokens_total", role="core", variant="bf16", kind="completion") == 12


async def test_stream_options_reach_the_engine_as_they_were_sent(stack: Stack) -> None:
    for path, asks in (("/v1/chat/completions", {"messages": []}), ("/v1/completions", {"prompt": "x"})):
        for more in (
            {"\ud800": 1},
            {"x": "\ud83d"},
            {"x": 10**40},
            {"x": float("inf")},
            {"x": [{"y": None}]},
        ):
            options = {"include_usage": True, **more}
            body = json.dumps({"model": "assistant", "stream": True, "stream_options": options, **asks})
            head = {"content-type": "application/json"}
            async with stack.http.post(stack.url + path, data=body, headers=head) as response:
                assert response.status == 200, more
                assert (await stack.events(response))[-1] == "[DONE]"
            sent = stack.asked("bf16")[-1]["stream_options"]
            assert sent == options | {"continuous_usage_stats": True}


def test_stream_options_that_are_too_deep_by_now_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_deep(*_: Any, **__: Any) -> str:
        raise RecursionError

    body = Body(b'{"stream": true, "stream_options": {"x": [[]]}}')
    wanted = OutputOptions.of(body.fields, chat=True, body=body)
    monkeypatch.setattr(json, "dumps", too_deep)
    with pytest.raises(BadRequestError, match="nested too deeply"):
        changes_for_engine(body, wanted, Quality(), tapped=False)


LOGPROBS = [  # what the client asks for, how many alternatives it sees, how many the engine is asked for
    ({}, None, 5),
    ({"logprobs": False}, None, 5),
    ({"logprobs": True}, 0, 5),
    ({"logprobs": True, "top_logprobs": 2}, 2, 5),
    ({"logprobs": True, "top_logprobs": 5}, 5, 5),
    ({"logprobs": True, "top_logprobs": 7}, 7, 7),
]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_are_those_that_were_asked_for(stack: Stack, stream: bool) -> None:
    for asked, shown, sent in LOGPROBS:
        async with stack.post({"stream": stream, **asked}) as response:
            answers = (await stack.events(response))[:-1] if stream else [await response.json()]
        request = stack.asked("bf16")[-1]
        assert (request["logprobs"], request["top_logprobs"]) == (True, sent)
        for answer in answers:
            logprobs = answer["choices"][0]["logprobs"]
            if shown is None:
                assert logprobs is None
            else:
                seen = [len(token["top_logprobs"]) for token in logprobs["content"]]
                assert seen == [shown] * (1 if stream else 4)
    signals = {"role": "core", "variant": "bf16"}
    await eventually(lambda: stack.sample("tiercel_token_nll_mean_count", **signals) == len(LOGPROBS))


async def test_text_completions_pass(stack: Stack) -> None:
    body = {"prompt": "The total", "logprobs": 1}
    async with stack.post(body, path="/v1/completions") as response:
        assert (await response.json())["choices"][0]["text"] == "The total is $277."
    async with stack.post(body | {"stream": True}, path="/v1/completions") as response:
        *events, done = await stack.events(response)
    assert "".join(event["choices"][0]["text"] for event in events) == "The total is $277."
    assert done == "[DONE]"
    assert stack.asked("bf16")[0]["logprobs"] == 1


@pytest.mark.parametrize("when", ["mid-stream", "before the first token", "not streamed"])
async def test_a_client_that_leaves_frees_the_engine(stack: Stack, when: str) -> None:
    engine = stack.engines["bf16"]
    if when == "mid-stream":
        engine.script.token_delay_s = 0.2
        response = await stack.post({"stream": True})
        await response.content.readany()
        response.close()
    else:
        engine.script.first_token_delay_s = 30
        request = asyncio.ensure_future(stack.post({"stream": when != "not streamed"}).__aenter__())
        await eventually(lambda: engine.running)
        request.cancel()
    await eventually(lambda: engine.aborted == 1 and engine.running == 0)
    await eventually(lambda: stack.requests("499") == 1)
    if when == "mid-stream":
        assert stack.sample("tiercel_tokens_total", role="core", variant="bf16", kind="completion") >= 1


async def test_dead_replica_is_left_for_a_living_one() -> None:
    async with running_gateway() as spare:
        alive = spare.engines["bf16"]
        async with alive.serving() as url:
            pools = {"bf16": ("http://127.0.0.1:1", url)}
            async with running_gateway(pools=pools, gateway={"health_interval_s": 60}) as stack:
                for _ in range(4):
                    async with stack.post() as response:
                        assert response.status == 200
                        assert response.headers["x-tiercel-replica"] == "assistant:bf16-1"
        assert len(from_clients(alive)) == 4


async def test_an_engine_that_took_a_request_and_died_is_not_given_it_again(stack: Stack) -> None:
    """Neither it nor another: a request that kills engines would be handed from one to the next."""
    engine = stack.engines["bf16"]
    async with stack.post() as response:
        assert response.status == 200, "there is a kept connection now"
    engine.script.die_after = 0
    async with stack.post() as response:
        assert response.status == 502
    assert len(from_clients(engine)) == 2


async def test_precision_rises_while_a_pool_is_down_and_comes_back(stack: Stack) -> None:
    async def served_by(variant: str, reason: str) -> bool:
        async with stack.post({"model": "intent_classifier"}) as response:
            headers = response.headers
        return (headers["x-tiercel-variant"], headers["x-tiercel-route-reason"]) == (variant, reason)

    assert await served_by("assistant:int4-kv8", "cheapest_in_budget")
    stack.engines["int4-kv8"].script.healthy = False
    await eventually(lambda: served_by("assistant:int8", "raised_pool_down"))
    stack.engines["int4-kv8"].script.healthy = True
    await eventually(lambda: served_by("assistant:int4-kv8", "cheapest_in_budget"))


async def test_no_replica_is_a_503_with_retry_after() -> None:
    async with (
        running_gateway(pools=addresses("http://127.0.0.1:1")) as stack,
        stack.post({"model": "intent_classifier"}) as response,
    ):
        assert response.status == 503
        assert response.headers["retry-after"] == "1"
        assert (await response.json())["error"]["code"] == "no_replica"


async def test_official_client(stack: Stack) -> None:
    async with openai.AsyncOpenAI(base_url=stack.url + "/v1", api_key="any", max_retries=0) as client:
        messages = [{"role": "user", "content": "hi"}]
        whole = await client.chat.completions.create(model="assistant", messages=messages)
        assert whole.choices[0].message.content == "The total is $277."
        assert whole.choices[0].logprobs is None
        stream = await client.chat.completions.create(
            model="summarizer", messages=messages, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content for c in chunks if c.choices) == "The total is $277."
        assert chunks[-1].usage.completion_tokens == 4
        assert "assistant:int8" in [model.id async for model in client.models.list()]
        with pytest.raises(openai.PermissionDeniedError, match="less precise"):
            await client.chat.completions.create(model="assistant:int8", messages=messages)
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="nothing", messages=messages)


async def test_many_streams_at_once(stack: Stack) -> None:
    stack.engines["bf16"].script.token_delay_s = 0.01

    async def one() -> str:
        async with stack.post({"stream": True}) as response:
            *events, done = await stack.events(response)
            assert done == "[DONE]"
            return "".join(event["choices"][0]["delta"]["content"] for event in events)

    assert set(await asyncio.gather(*(one() for _ in range(50)))) == {"The total is $277."}


async def test_access_log_has_figures_and_no_prompt(stack: Stack, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        stack.gateway.plane.log = log = AccessLog(LogWriter(file.fileno()))
        stack.gateway.plane.ledger.log = log
        async with stack.post({"user": "session-7"}, headers={"x-agent-role": "summarizer"}) as response:
            await response.read()
        log.flush()
        log.writer.close(within_s=30)
    text = (tmp_path / "log").read_text()
    fields = json.loads(text)
    assert fields["role"] == "summarizer"
    assert (fields["variant"], fields["reason"], fields["status"]) == (
        "assistant:int8",
        "cheapest_in_budget",
        200,
    )
    assert (fields["session"], fields["completion_tokens"]) == ("session-7", 4)
    assert "Greta" not in text


async def test_stopping_lets_a_stream_finish_or_says_why_not() -> None:
    async with aiohttp.ClientSession() as http:
        async with running_gateway() as stack:
            url = stack.url + CHAT
            stack.engines["bf16"].script.token_delay_s = 0.1
            stack.engines["int8"].script.token_delay_s = 30
            question = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
            short = await http.post(url, json=question | {"model": "assistant"})
            endless = await http.post(url, json=question | {"model": "summarizer"})
            reading = [asyncio.create_task(response.text()) for response in (short, endless)]
        assert (await reading[0]).endswith("data: [DONE]\n\n")
        last = (await reading[1]).strip().splitlines()[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
