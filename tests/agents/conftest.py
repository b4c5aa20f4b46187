"""A gateway without engines: records each request and answers what a test wrote down for it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

HERE = Path(__file__).parent
LITELLMS_OWN_FILTERS = (
    "ignore:.*using the `ReadOnly` qualifier:UserWarning",
    "ignore:Accessing the .* attribute on the instance is deprecated:DeprecationWarning",
)
"""LiteLLM ignores these when it is imported, because its answers cause them; pytest undoes that for
each test."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            for own in LITELLMS_OWN_FILTERS:
                item.add_marker(pytest.mark.filterwarnings(own))


@dataclass(frozen=True)
class Seen:
    """One request as it came over the wire; header names in lower case."""

    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def agent(self) -> str:
        return self.headers.get("x-agent-name", "")

    def texts(self, role: str) -> list[str]:
        return [m["content"] for m in self.body["messages"] if m["role"] == role]


@dataclass
class FakeGateway:
    """Answers ``words`` to each agent from ``variant``; ``fail`` turns a request into an HTTP error."""

    words: dict[str, list[str]] = field(default_factory=dict)
    variant: dict[str, str] = field(default_factory=dict)
    fail: Callable[[Seen], int | None] = lambda _: None
    break_stream: Callable[[Seen], bool] = lambda _: False
    delay_s: float = 0.0
    arguments: dict[str, Any] | None = None
    """Of tool calls; None: what the schema allows."""
    seen: list[Seen] = field(default_factory=list)
    url: str = ""
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    under_way: int = 0
    most_under_way: int = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        seen = Seen(headers, await request.json())
        self.seen.append(seen)
        self.asked.set()
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            return await self._answer(request, seen)
        finally:
            self.under_way -= 1

    async def _answer(self, request: web.Request, seen: Seen) -> web.StreamResponse:
        told = {
            "x-request-id": f"req-{len(self.seen)}",
            "x-tiercel-variant": self.variant.get(seen.agent, "assistant:bf16"),
            "x-tiercel-replica": "r0",
            "x-tiercel-route-reason": f"cheapest that passed for {seen.agent}",
        }
        if status := self.fail(seen):
            error = {"message": "no replica can take it", "type": "server_error", "code": None}
            return web.json_response({"error": error}, status=status, headers=told)
        words = self.words.get(seen.agent, ["a", " word"])
        usage = {"prompt_tokens": 9, "completion_tokens": len(words), "total_tokens": 9 + len(words)}
        if isinstance(choice := seen.body.get("tool_choice"), dict):
            return await self._call(request, seen, choice["function"]["name"], told)
        base = {"id": "c1", "created": 1, "model": seen.body["model"]}
        if not seen.body.get("stream"):
            message = {"role": "assistant", "content": "".join(words)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            whole = {**base, "object": "chat.completion", "choices": [choice], "usage": usage}
            return web.json_response(whole, headers=told)
        response = web.StreamResponse(headers={**told, "content-type": "text/event-stream"})
        await response.prepare(request)
        chunk = {**base, "object": "chat.completion.chunk"}

        async def send(choices: list[dict[str, Any]], **more: Any) -> None:
            await response.write(
                b"data: " + json.dumps({**chunk, "choices": choices, **more}).encode() + b"\n\n"
            )

        await send([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        for word in words:
            await asyncio.sleep(self.delay_s)
            await send([{"index": 0, "delta": {"content": word}, "finish_reason": None}])
        if self.break_stream(seen):
            await response.write(b'data: {"error": {"message": "the replica died", "code": 502}}\n\n')
            return response
        await send([{"index": 0, "delta": {}, "finish_reason": "stop"}])
        await send([], usage=usage)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _call(
        self, request: web.Request, seen: Seen, name: str, told: dict[str, str]
    ) -> web.StreamResponse:
        """The named tool, with the first value that its schema allows each argument, in two pieces."""
        (tool,) = (one["function"] for one in seen.body["tools"] if one["function"]["name"] == name)
        values = {key: of["enum"][0] for key, of in tool["parameters"]["properties"].items()}
        text = json.dumps(values if self.arguments is None else self.arguments)
        response = web.StreamResponse(headers={**told, "content-type": "text/event-stream"})
        await response.prepare(request)
        chunk = {"id": "c1", "created": 1, "model": seen.body["model"], "object": "chat.completion.chunk"}
        function = {"name": name, "arguments": text[:5]}
        first = {"index": 0, "id": "call-1", "type": "function", "function": function}
        rest = {"index": 0, "function": {"arguments": text[5:]}}
        deltas = [{"role": "assistant", "tool_calls": [first]}, {"tool_calls": [rest]}]
        choices = [[{"index": 0, "delta": delta, "finish_reason": None}] for delta in deltas]
        choices.append([{"index": 0, "delta": {}, "finish_reason": "stop"}])
        usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
        for event in (*({"choices": one} for one in choices), {"choices": [], "usage": usage}):
            await response.write(b"data: " + json.dumps({**chunk, **event}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest_asyncio.fixture
async def gateway() -> AsyncIterator[FakeGateway]:
    """A fake gateway that listens on a free loopback port."""
    gateway = FakeGateway()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", gateway.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    gateway.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield gateway
    finally:
        await runner.cleanup()


@pytest.fixture(scope="session", autouse=True)
def stay_on_this_machine() -> Iterator[None]:
    """No test here may make a connection beyond loopback: LiteLLM and ADK must not phone home."""
    connect = socket.socket.connect
    outside: list[Any] = []

    def watched(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and not ip_address(address[0]).is_loopback:
            outside.append(address)
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", watched)
        yield
    assert not outside
