"""A fake engine that answers ``/v1/responses`` in vLLM's shapes."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web
from gateway_stack import Stack, make_cards, make_config, serving
from prometheus_client import CollectorRegistry

from gateway.app import Gateway
from gateway.upstream.fake import FakeEngine, Script

_numbers = itertools.count(1)


class ResponsesEngine(FakeEngine):
    """Says how many items it was given, and what the last one was; ``calls`` makes it call a tool instead."""

    def __init__(self, name: str) -> None:
        super().__init__(Script())
        self.name = name
        self.calls: list[str] = []
        """Names of tools that it calls in its next answers."""
        self.extra: list[dict[str, Any]] = []
        """Items before its message, in its next answer."""
        self.held: asyncio.Event | None = None
        """Not set: the end of an answer waits for it."""
        self.refuses: dict[str, Any] | None = None
        """An error that it answers with, as 400."""
        self.breaks = False
        """It ends a stream with vLLM's error event."""

    def app(self) -> web.Application:
        app = super().app()
        app.router.add_post("/v1/responses/input_tokens", self._count)
        return app

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/v1/responses":
            return await self._respond(request)
        return await super()._complete(request)

    async def _respond(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self._saw(request, body)
        if self.refuses is not None:
            return web.json_response({"error": self.refuses}, status=400)
        self.running += 1
        try:
            if body.get("stream"):
                return await self._respond_in_events(request, body)
            await self._wait()
            return web.json_response(self._object(body, "completed", self._items(body)))
        except (asyncio.CancelledError, ConnectionError):
            self.aborted += 1
            raise
        finally:
            self.running -= 1

    async def _count(self, request: web.Request) -> web.Response:
        body = await request.json()
        self._saw(request, body)
        return web.json_response({"object": "response.input_tokens", "input_tokens": len(body["input"])})

    async def _wait(self) -> None:
        if self.held is not None:
            await self.held.wait()

    def _items(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        items, self.extra = self.extra, []
        number = next(_numbers)
        if self.calls:
            call = {"type": "function_call", "id": f"fc_{number}", "call_id": f"call_{number}"}
            return [*items, {**call, "name": self.calls.pop(0), "arguments": "{}", "status": "completed"}]
        given = body["input"]
        last = given if isinstance(given, str) else given[-1].get("content") or given[-1].get("output")
        if isinstance(last, list):
            last = last[0]["text"]
        text = f"{self.name}: {1 if isinstance(given, str) else len(given)} items, the last {last}"
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": [{"token": "x"}]}
        message = {"type": "message", "id": f"msg_{number}", "role": "assistant", "status": "completed"}
        return [*items, {**message, "content": [part], "phase": None}]

    def _object(self, body: dict[str, Any], status: str, items: list[Any]) -> dict[str, Any]:
        self.last_id = body.get("request_id") or f"resp_{next(_numbers):016x}"
        usage = {"input_tokens": 5, "output_tokens": 2, "total_tokens": 7}
        usage |= {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {}}
        return {
            "id": self.last_id,
            "created_at": 1,
            "object": "response",
            "status": status,
            "model": body["model"],
            "output": items,
            "instructions": body.get("instructions"),
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "background": False,
            "previous_response_id": None,
            "usage": usage if status == "completed" else None,
        }

    async def _respond_in_events(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await answer.prepare(request)
        numbers = itertools.count()

        async def send(kind: str, **fields: Any) -> None:
            event = {**fields, "sequence_number": next(numbers), "type": kind}
            await answer.write(f"event: {kind}\ndata: {json.dumps(event)}\n\n".encode())

        begun = self._object(body, "in_progress", [])
        await send("response.created", response=begun)
        await send("response.in_progress", response=begun)
        await self._wait()
        if self.breaks:
            error = {"error": {"message": "the engine is dead", "type": "InternalServerError", "code": 500}}
            await answer.write(f"data: {json.dumps(error)}\n\n".encode())
            return answer
        items = self._items(body)
        for index, item in enumerate(items):
            await send("response.output_item.added", output_index=index, item={**item, "content": []})
            for part in item.get("content") or ():
                where = {"item_id": item["id"], "output_index": index, "content_index": 0}
                await send("response.content_part.added", **where, part={**part, "text": ""})
                await send("response.output_text.delta", **where, delta=part["text"], logprobs=[])
                await send("response.output_text.done", **where, text=part["text"], logprobs=[])
                await send("response.content_part.done", **where, part=part)
            await send("response.output_item.done", output_index=index, item=item)
        await send("response.completed", response={**begun, **self._done(body, items)})
        return answer

    def _done(self, body: dict[str, Any], items: list[Any]) -> dict[str, Any]:
        name = self.last_id
        return self._object(body, "completed", items) | {"id": name}


@asynccontextmanager
async def gateways_over(
    engines: Mapping[str, FakeEngine],
    pools: Mapping[str, Sequence[str]],
    changes: Iterable[Mapping[str, Any]],
    **common: Any,
) -> AsyncIterator[list[Stack]]:
    """A gateway for each of ``changes`` over the same engines. ``pools``: names of engines by variant."""
    cards = {card.id: card for card in make_cards().values() if card.variant in pools}
    async with AsyncExitStack() as exits:
        urls = {name: await exits.enter_async_context(engine.serving()) for name, engine in engines.items()}
        stacks = []
        for own in changes:
            placed = {variant: tuple(urls[name] for name in names) for variant, names in pools.items()}
            registry = CollectorRegistry()
            gateway = Gateway(make_config(**{"pools": placed, **common, **own}), cards, registry)
            url = await exits.enter_async_context(serving(gateway.app, http=gateway.protocol))
            http = await exits.enter_async_context(aiohttp.ClientSession())
            stack = Stack(url, http, registry, gateway)
            stack.engines.update(engines)
            stacks.append(stack)
        yield stacks


@asynccontextmanager
async def responses_gateway(gateways: int = 1, **changes: Any) -> AsyncIterator[list[Stack]]:
    """Gateways over the same engines: two replicas of bf16 (``a``, ``b``), and one of int8."""
    engines = {name: ResponsesEngine(name) for name in ("a", "b", "int8")}
    common = {
        "serve": ("bf16", "int8"),
        "gateway": {"policy": "round_robin"},
        "watch": {"enabled": False},
    } | changes
    pools = {"bf16": ("a", "b"), "int8": ("int8",)}
    async with gateways_over(engines, pools, [{}] * gateways, **common) as stacks:
        yield stacks
