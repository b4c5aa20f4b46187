"""What vLLM coerces, the gateway passes and understands alike: the same requests straight to an engine that
reads them with vLLM's types, and through the gateway. The real engine is asked more in
``tests/e2e/test_differential.py``."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from gateway_stack import CHAT, OTHERS, addresses, running_gateway
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from gateway.upstream.fake import listen

QUESTION = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}
VALUES = (
    None, True, False, 0, 1, 2, -1, 0.0, 1.0, 1.5, float("nan"), float("inf"), "0", "1", " 1", "2.0", "true",
    "TRUE", "yes", "off", "abc", "", "\ud800", [], [1], {}, {"a": 1},
)  # fmt: skip
FIELDS = (
    "stream", "n", "max_tokens", "temperature", "logprobs", "top_logprobs", "echo", "user", "metadata",
    "vllm_xargs", "prompt_cache_key", "cache_salt", "something_else",
)  # fmt: skip


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class Request(BaseModel):
    """vLLM's request for a chat, as far as the gateway reads it."""

    model_config = ConfigDict(extra="allow")
    messages: list[dict[str, Any]]
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = 1
    max_tokens: int | None = None
    temperature: float | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = 0
    user: str | None = None
    cache_salt: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _belong_together(cls, data: dict[str, Any]) -> dict[str, Any]:
        if data.get("stream_options") and not data.get("stream"):
            raise ValueError("stream_options needs stream")
        if (top := data.get("top_logprobs")) is not None:
            if not isinstance(top, int | float):
                raise ValueError("top_logprobs must be an integer")
            if (top < 0 and top != -1) or (top and not data.get("logprobs")):
                raise ValueError("top_logprobs needs logprobs")
        return data


class Engine:
    """Answers with how many log-probabilities it was asked for, and whether it streams."""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post(CHAT, self._chat)
        app.router.add_post("/v1/completions/render", self._render)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._health)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            yield await listen(runner, also=OTHERS)
        finally:
            await runner.cleanup()

    async def _render(self, request: web.Request) -> web.Response:
        return web.json_response([{"token_ids": [5, 6]} for _ in (await request.json())["prompt"]])

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        try:
            asked = Request.model_validate(json.loads(await request.read()))
        except ValidationError as error:
            said = {
                "message": str(error.errors()[0]["msg"]),
                "type": "Bad Request",
                "param": None,
                "code": 400,
            }
            return web.json_response({"error": said}, status=400)
        token = {"token": "a", "logprob": -0.1, "bytes": [97]}
        content = [{**token, "top_logprobs": [token] * max(asked.top_logprobs or 0, 0)}]
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        choice["logprobs"] = {"content": content} if asked.logprobs else None
        head = {"id": "a", "model": asked.model, "created": 1}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        if not asked.stream:
            choice["message"] = {"role": "assistant", "content": "a"}
            return web.json_response(
                {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
            )
        wanted = asked.stream_options or StreamOptions()
        chunk = {
            **head,
            "object": "chat.completion.chunk",
            "choices": [{**choice, "delta": {"content": "a"}}],
        }
        if wanted.include_usage and wanted.continuous_usage_stats:
            chunk["usage"] = usage
        events = [chunk, *([{**head, "choices": [], "usage": usage}] if wanted.include_usage else [])]
        text = "".join(f"data: {json.dumps(event, separators=(',', ':'))}\n\n" for event in events)
        return web.Response(text=text + "data: [DONE]\n\n", content_type="text/event-stream")


def questions() -> list[dict[str, Any]]:
    one = [QUESTION | {field: value} for field in FIELDS for value in VALUES]
    streams: list[Any] = [None, True, False, 0, 1, "yes", "no", "abc", []]
    wishes: list[Any] = [
        None,
        {},
        [],
        "a",
        3,
        *({"include_usage": value} for value in (True, 1, "no", "abc", [])),
    ]
    both = {"include_usage": "1", "continuous_usage_stats": 1.0}
    two = [
        QUESTION | {"stream": stream, "stream_options": wish}
        for stream in streams
        for wish in (*wishes, both)
    ]
    logprobs: list[Any] = [None, True, False, 1, 0, "true", "no", "abc", []]
    tops: list[Any] = [None, 0, 2, 2.0, -1, -2, "2", "abc", True, []]
    three = [QUESTION | {"logprobs": logprob, "top_logprobs": top} for logprob in logprobs for top in tops]
    roles = [
        QUESTION | {"messages": [{"role": role, "content": content}]}
        for role in ("robot", "tool", 3, None)
        for content in ("hi", None, 3, ["hi"])
    ]
    bare: list[dict[str, Any]] = [{}, {"messages": []}, {"messages": "hi"}]
    return [*one, *two, *three, *roles, *bare, *(QUESTION | {"model": model} for model in (None, ""))]


@pytest.mark.parametrize("sample_rate", [0.0, 1.0])
async def test_the_gateway_is_as_wide_as_the_engine(sample_rate: float) -> None:
    """Whether an answer is listened to changes nothing either."""
    quality = {"sample_rate": sample_rate}
    async with (
        Engine().serving() as direct,
        running_gateway(pools=addresses(direct), quality=quality) as stack,
    ):

        async def ask(url: str, raw: bytes) -> tuple[int, Any]:
            headers = {"content-type": "application/json"}
            async with stack.http.post(url + CHAT, data=raw, headers=headers) as response:
                text = await response.text()
                if response.status != 200:
                    return response.status, None
                if response.content_type == "application/json":
                    return 200, json.loads(text) | {"model": None}
                return 200, text.replace('"model":null', '"model":"assistant"')

        for question in questions():
            raw = json.dumps(question).encode()
            assert await ask(stack.url, raw) == await ask(direct, raw), question


async def test_an_answer_may_be_a_list() -> None:
    """As vLLM renders several prompts."""
    async with Engine().serving() as direct, running_gateway(pools=addresses(direct)) as stack:
        for path in ("/v1/completions/render", "/completions/render/"):
            async with stack.http.post(stack.url + path, json={"prompt": ["a", "b"]}) as response:
                assert response.status == 200
                assert await response.json() == [{"token_ids": [5, 6]}] * 2
