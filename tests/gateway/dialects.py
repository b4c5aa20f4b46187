"""A provider on this machine that speaks OpenAI's, Anthropic's, Ollama's and Gemini's dialects.

What it says, and how it fails, is one ``Script`` for all of them, so that a test can ask the same thing of
each. OpenAI's JSON has spaces, as the original's and many others' has.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from gateway.upstream.fake import listen

PROMPT_TOKENS, CACHED_TOKENS, COMPLETION_TOKENS = 20, 8, 6
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


@dataclass
class Script:
    """How the provider behaves; change it at any time."""

    text: str = "It is a fine day."
    calls: tuple[dict[str, Any], ...] = ()
    """Arguments of the calls of ``weather`` that it makes instead of saying something."""
    status: int = 200
    error: Any = None
    """The body of an answer with another status; its own dialect's envelope if None."""
    headers: Mapping[str, str] | list[tuple[str, str]] = field(default_factory=dict)
    delay_s: float = 0.0
    """Before the first byte."""
    chunk_delay_s: float = 0.0
    silent_after: int | None = None
    """Send so many chunks of a stream, and then nothing more."""
    die_after: int | None = None
    """Cut the connection after so many chunks of a stream; an answer that is not streamed, at 0."""
    end_after: int | None = None
    """End a stream properly, as HTTP goes, after so many chunks."""
    until: asyncio.Event | None = None
    """Cut or end a stream no sooner than this is set."""
    garbage: bool = False
    endless: bool = False
    """Stream text for ever, as fast as it is taken."""


class ProviderServer:
    """A server of all dialects and what it has seen."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.running = 0
        self.aborted = 0
        self.sent = 0
        """Chunks of streams that were handed to the system."""

    @asynccontextmanager
    async def serving(self, also: Sequence[str] = ()) -> AsyncIterator[str]:
        """Serve while the block lasts; gives the base URL."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/chat/completions", self._openai)
        app.router.add_post("/v1/embeddings", self._embeddings)
        app.router.add_post("/v1/messages", self._anthropic)
        app.router.add_get("/health", self._healthy)
        app.router.add_post("/api/chat", self._ollama)
        app.router.add_post("/api/show", self._show)
        app.router.add_post("/{where:.*}:generateContent", self._gemini)
        app.router.add_post("/{where:.*}:streamGenerateContent", self._gemini_stream)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        try:
            yield await listen(runner, also=also)
        finally:
            await runner.cleanup()

    # the dialects

    async def _openai(self, request: web.Request) -> web.StreamResponse:
        body = await self._read(request)
        body["answered"] = any(message["role"] == "tool" for message in body["messages"])
        stream = bool(body.get("stream"))
        usage = (body.get("stream_options") or {}).get("include_usage")
        if not stream:
            return await self._answer(request, self._openai_whole(body))
        events = [json.dumps(chunk).encode() for chunk in self._openai_chunks(body, usage)]
        return await self._answer(request, [b"data: %b\n\n" % one for one in (*events, b"[DONE]")])

    def _openai_whole(self, body: dict[str, Any]) -> dict[str, Any]:
        calls = self._openai_calls(body)
        message: dict[str, Any] = {"role": "assistant", "content": None if calls else self.script.text}
        choice = {
            "index": 0,
            "message": message | ({"tool_calls": calls} if calls else {}) | {"refusal": None},
            "logprobs": None,
            "finish_reason": "tool_calls" if calls else "stop",
        }
        head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"]}
        return {**head, "choices": [choice], "usage": _openai_usage(), "system_fingerprint": "fp_1"}

    def _openai_chunks(self, body: dict[str, Any], usage: Any) -> Iterator[dict[str, Any]]:
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}

        def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            return {**head, "choices": [choice], **({"usage": None} if usage else {})}

        calls = self._openai_calls(body)
        yield chunk({"role": "assistant", "content": None if calls else "", "refusal": None})
        for index, call in enumerate(calls):
            arguments = call["function"]["arguments"]
            begun = {**call, "index": index, "function": {"name": call["function"]["name"], "arguments": ""}}
            yield chunk({"tool_calls": [begun]})
            for part in (arguments[:4], arguments[4:]):
                yield chunk({"tool_calls": [{"index": index, "function": {"arguments": part}}]})
        for word in () if calls else self._words():
            yield chunk({"content": word})
        yield chunk({}, "tool_calls" if calls else "stop")
        if usage:
            yield {**head, "choices": [], "usage": _openai_usage()}

    def _openai_calls(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """None once a tool has answered: then it says its text."""
        return [
            {
                "id": f"call_{index}",
                "type": "function",
                "function": {"name": "weather", "arguments": json.dumps(arguments)},
            }
            for index, arguments in enumerate(() if body["answered"] else self.script.calls)
        ]

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        body = await self._read(request)
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        data = [
            {"object": "embedding", "index": index, "embedding": [0.5, float(len(text))]}
            for index, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
        return await self._answer(
            request, {"object": "list", "model": body["model"], "data": data, "usage": usage}
        )

    async def _anthropic(self, request: web.Request) -> web.StreamResponse:
        body = await self._read(request)
        blocks: list[dict[str, Any]] = [
            {"type": "tool_use", "id": f"toolu_{index}", "name": "weather", "input": arguments}
            for index, arguments in enumerate(self.script.calls)
        ]
        why = "tool_use" if blocks else "end_turn"
        blocks = blocks or [{"type": "text", "text": self.script.text}]
        usage = {
            "input_tokens": PROMPT_TOKENS - CACHED_TOKENS,
            "cache_read_input_tokens": CACHED_TOKENS,
            "cache_creation_input_tokens": 0,
            "output_tokens": COMPLETION_TOKENS,
        }
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"]}
        if not body.get("stream"):
            return await self._answer(
                request,
                {**message, "content": blocks, "stop_reason": why, "stop_sequence": None, "usage": usage},
            )
        begun = {**message, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
        events: list[dict[str, Any]] = [{"type": "message_start", "message": begun}]
        for index, block in enumerate(blocks):
            empty = {**block, "text": ""} if block["type"] == "text" else {**block, "input": {}}
            events.append({"type": "content_block_start", "index": index, "content_block": empty})
            if block["type"] == "text":
                deltas = [{"type": "text_delta", "text": word} for word in self._words()]
            else:
                deltas = [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]
            events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
            events.append({"type": "content_block_stop", "index": index})
        events.append(
            {
                "type": "message_delta",
                "delta": {"stop_reason": why, "stop_sequence": None},
                "usage": {"output_tokens": COMPLETION_TOKENS},
            }
        )
        events.append({"type": "message_stop"})
        return await self._answer(
            request, [f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in events]
        )

    async def _ollama(self, request: web.Request) -> web.StreamResponse:
        body = await self._read(request)
        calls = [{"function": {"name": "weather", "arguments": a}} for a in self.script.calls]
        head = {"model": body["model"], "created_at": "2026-01-01T00:00:00Z"}
        end = {
            "done": True,
            "done_reason": "stop",
            "prompt_eval_count": PROMPT_TOKENS,
            "eval_count": COMPLETION_TOKENS,
        }
        said = {"role": "assistant", "content": "" if calls else self.script.text}
        if not body.get("stream"):
            message = said | ({"tool_calls": calls} if calls else {})
            return await self._answer(request, {**head, "message": message, **end})
        parts = [{"role": "assistant", "content": "", "tool_calls": calls}] if calls else []
        parts = parts or [{"role": "assistant", "content": word} for word in self._words()]
        lines = [{**head, "message": part, "done": False} for part in parts]
        lines.append({**head, "message": {"role": "assistant", "content": ""}, **end})
        return await self._answer(
            request, [json.dumps(line).encode() + b"\n" for line in lines], "application/x-ndjson"
        )

    async def _show(self, request: web.Request) -> web.Response:
        """LiteLLM asks Ollama what a model can do."""
        return web.json_response({"capabilities": ["completion", "tools"], "model_info": {}, "template": ""})

    async def _healthy(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _gemini(self, request: web.Request) -> web.StreamResponse:
        await self._read(request)
        return await self._answer(request, self._gemini_part(self._gemini_parts(), last=True))

    async def _gemini_stream(self, request: web.Request) -> web.StreamResponse:
        await self._read(request)
        parts = self._gemini_parts()
        if not self.script.calls:
            parts = [{"text": word} for word in self._words()]
        chunks = [self._gemini_part([part], last=part is parts[-1]) for part in parts]
        return await self._answer(
            request, [b"data: " + json.dumps(chunk).encode() + b"\r\n\r\n" for chunk in chunks]
        )

    def _gemini_parts(self) -> list[dict[str, Any]]:
        calls = [{"functionCall": {"name": "weather", "args": a}} for a in self.script.calls]
        return calls or [{"text": self.script.text}]

    def _gemini_part(self, parts: list[dict[str, Any]], *, last: bool) -> dict[str, Any]:
        candidate: dict[str, Any] = {"content": {"role": "model", "parts": parts}, "index": 0}
        usage = {
            "promptTokenCount": PROMPT_TOKENS,
            "cachedContentTokenCount": CACHED_TOKENS,
            "candidatesTokenCount": COMPLETION_TOKENS,
            "totalTokenCount": PROMPT_TOKENS + COMPLETION_TOKENS,
        }
        if last:
            candidate["finishReason"] = "STOP"
        return {"candidates": [candidate], "modelVersion": "gemini-x", "usageMetadata": usage}

    # how it answers

    async def _read(self, request: web.Request) -> dict[str, Any]:
        body: dict[str, Any] = await request.json()
        self.requests.append(body)
        self.headers.append(request.headers)
        return body

    def _words(self) -> list[str]:
        return [word if index == 0 else " " + word for index, word in enumerate(self.script.text.split(" "))]

    async def _answer(
        self, request: web.Request, answer: dict[str, Any] | list[bytes], kind: str = "text/event-stream"
    ) -> web.StreamResponse:
        self.running += 1
        try:
            return await self._scripted(request, answer, kind)
        except (asyncio.CancelledError, ConnectionError):
            self.aborted += 1
            raise
        finally:
            self.running -= 1

    async def _scripted(
        self, request: web.Request, answer: dict[str, Any] | list[bytes], kind: str
    ) -> web.StreamResponse:
        script = self.script
        await asyncio.sleep(script.delay_s)
        if script.status != 200:
            said = script.error
            if said is None:
                said = {"error": {"message": "scripted failure", "type": "scripted", "code": "scripted"}}
            text = said if isinstance(said, str) else json.dumps(said)
            text = text.replace("{authorization}", request.headers.get("authorization", ""))
            failed = web.Response(status=script.status, text=text, content_type="application/json")
            failed.headers.extend(script.headers)
            return failed
        if script.die_after == 0:
            return _die(request, web.Response())
        if script.garbage:
            return web.Response(text="<html>no answer</html>\n\n", content_type="text/html")
        if isinstance(answer, dict):
            return web.json_response(answer)
        response = web.StreamResponse(headers={"content-type": kind})
        await response.prepare(request)
        if script.endless:
            while True:
                await response.write(answer[1])
                self.sent += 1
        for index, chunk in enumerate(answer):
            if index in (script.die_after, script.end_after) and script.until is not None:
                await script.until.wait()
            if index == script.die_after:
                return _die(request, response)
            if index == script.end_after:
                return response
            if index == script.silent_after:
                await asyncio.sleep(60)
            await response.write(chunk)
            await asyncio.sleep(script.chunk_delay_s)
        return response


def _die(request: web.Request, begun: web.StreamResponse) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return begun


def _openai_usage() -> dict[str, Any]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": COMPLETION_TOKENS,
        "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
        "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 2, "audio_tokens": 0},
    }
