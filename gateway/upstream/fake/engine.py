"""The fake engine's server: vLLM's endpoints, its refusals, and what goes wrong with them.

It speaks chat and text completions, responses and Anthropic's messages (streamed or not), embeddings and
the other pooling endpoints, ``/tokenize``, ``/health`` and ``/metrics`` with vLLM's names, stops when its
client leaves, misbehaves as its script says, and keeps an account of what it did.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from gateway.upstream.fake.account import BROKEN, REFUSED, REPORTED, Account, Entry
from gateway.upstream.fake.answers import Answer, answer_for
from gateway.upstream.fake.parts import encoded, event, prompts_of, score
from gateway.upstream.fake.script import Script

KEEP_ALIVE = b": keep-alive\n\n"
_ANSWERED = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
)
_POOLED = ("/v1/embeddings", "/score", "/v1/score", "/rerank", "/v1/rerank", "/classify", "/pooling")


async def listen(
    runner: web.AppRunner, port: int = 0, host: str = "127.0.0.1", also: Sequence[str] = ()
) -> str:
    """Have a server that is set up listen at a port of several hosts; the URL of the first."""
    await web.TCPSite(runner, host, port).start()
    taken: int = runner.addresses[0][1]
    for other in also:
        await web.TCPSite(runner, other, taken).start()
    return f"http://{host}:{taken}"


class FakeEngine:
    """A fake engine and what it has seen."""

    def __init__(self, script: Script | None = None, account: Account | None = None) -> None:
        self.script = script or Script()
        self.scripts: Callable[[dict[str, Any]], Script] | None = None
        """Gives each request a script of its own, from its body."""
        self.account = account or Account()
        self.keep_requests = True
        self.requests: list[dict[str, Any]] = []
        """Body of every completion request, in order."""
        self.headers: list[Mapping[str, str]] = []
        """Its headers."""
        self.running = 0
        self.aborted = 0
        self.waiting = 0
        """What ``/metrics`` reports as waiting."""
        self.kv_cache_usage = 0.0
        self.preemptions = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20, middlewares=[self._admit])
        for path in _ANSWERED:
            app.router.add_post(path, self._complete)
        for path in _POOLED:
            app.router.add_post(path, self._pool)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/v1/messages/count_tokens", self._count_tokens)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        return app

    @asynccontextmanager
    async def serving(
        self, port: int = 0, host: str = "127.0.0.1", also: Sequence[str] = ()
    ) -> AsyncIterator[str]:
        """Serve while the block lasts; gives the base URL. Port 0 takes a free one, ``also`` are other hosts
        that are listened to at the same port."""
        runner = web.AppRunner(self.app(), handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        try:
            yield await listen(runner, port, host, also)
        finally:
            await runner.cleanup()

    @web.middleware
    async def _admit(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        key, asked = self.script.key, request.path not in ("/health", "/metrics")
        if asked and key is not None and request.headers.get("authorization") != f"Bearer {key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self.script.healthy else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        figures = {
            "num_requests_running": self.running,
            "num_requests_waiting": self.waiting,
            "kv_cache_usage_perc": self.kv_cache_usage,
            "num_preemptions_total": self.preemptions,
        }
        lines = []
        for name, value in figures.items():
            lines.append(f"# HELP vllm:{name} {name}\n# TYPE vllm:{name} gauge")
            lines.append(f'vllm:{name}{{engine="0",model_name="fake"}} {float(value)}')
        return web.Response(text="\n".join(lines) + "\n")

    async def _pool(self, request: web.Request) -> web.Response:
        """Embeddings, as numbers or as bytes; the other endpoints of pooling have their usage only."""
        body = await request.json()
        self._saw(request, body)
        script = self.scripts(body) if self.scripts else self.script
        given = body.get("input") or [body.get("query"), *body.get("documents", ())]
        texts = given if isinstance(given, list) else [given]
        entry = self.account.open(request.headers.get("x-request-id", ""), request.path)
        with self._counted(entry):
            prompt = sum(len(words) for words in prompts_of({"prompt": texts}))
            if script.status == 200:
                entry.take_in(prompt)
            await asyncio.sleep(script.first_token_delay_s)
            if script.status != 200:
                return self._refusal(script, entry)
            if script.stall_after is not None:
                await asyncio.Event().wait()
            if script.die_after is not None:
                self._die(request)
                return web.Response()
            usage = {"prompt_tokens": prompt, "total_tokens": prompt}
            entry.end(REPORTED)
            if body.get("encoding_format") in ("bytes", "bytes_only"):
                numbers = b"".join(struct.pack("<4f", 0.5, 0.5, 0.5, len(str(text))) for text in texts)
                headers = {"metadata": encoded({"usage": usage}, script)}
                return web.Response(body=numbers, headers=headers, content_type="application/octet-stream")
            data = [
                {"object": "embedding", "index": index, "embedding": [0.5, 0.5, 0.5, float(len(str(text)))]}
                for index, text in enumerate(texts)
            ]
            return _json({"object": "list", "model": "fake", "data": data, "usage": usage}, script)

    async def _tokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"count": sum(map(len, prompts_of(await request.json())))})

    async def _count_tokens(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"input_tokens": answer_for("/v1/messages", body, "", self.script).prompt})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self._saw(request, body)
        entry = self.account.open(request.headers.get("x-request-id", ""), request.path)
        with self._counted(entry):
            try:
                return await self._answer(request, body, entry)
            except ConnectionError:  # the client has left, and aiohttp would log it as a defect
                self.aborted += 1
                return web.Response()

    def _saw(self, request: web.Request, body: dict[str, Any]) -> None:
        if self.keep_requests:
            self.requests.append(body)
            self.headers.append(request.headers)

    def _counted(self, entry: Entry) -> _Counted:
        return _Counted(self, entry)

    def _refusal(self, script: Script, entry: Entry) -> web.Response:
        entry.end(REFUSED)
        kind = "BadRequestError"
        error = {"message": script.message, "type": kind, "param": None, "code": script.status}
        return web.json_response({"error": error}, status=script.status)

    async def _answer(self, request: web.Request, body: dict[str, Any], entry: Entry) -> web.StreamResponse:
        script = self.scripts(body) if self.scripts else self.script
        if body.get("priority") and not script.knows_priority:
            entry.end(REFUSED)
            error = {"message": "Got priority 1000 but Priority scheduling is not enabled.", "code": 400}
            return web.json_response({"error": error}, status=400)
        if script.status != 200:
            await asyncio.sleep(script.first_token_delay_s)
            return self._refusal(script, entry)
        text = script.text
        if body.get("prompt_logprobs") is None and script.replies:
            text = script.replies.pop(0)
        if script.echo:
            text = "<" + "".join(filter(str.isdigit, body["messages"][-1]["content"])) + ">"
        answer = answer_for(request.path, body, text, script)
        entry.take_in(answer.prompt, answer.cached)
        if body.get("stream") and script.keep_alive_s:
            return await self._stream(request, answer, script, entry)
        await asyncio.sleep(script.first_token_delay_s)
        if script.hold is not None:
            await script.hold.wait()
        if script.stall_after is not None and not body.get("stream"):
            await asyncio.Event().wait()
        if script.die_after == 0:
            return self._die(request)
        if script.garbage:
            return web.Response(text="<html>not an answer</html>\n\n", content_type="text/html")
        if body.get("prompt_logprobs") is not None:
            return web.json_response(score(body, script.disputes))
        if body.get("stream"):
            return await self._stream(request, answer, script, entry)
        return await self._whole(request, answer, script, entry)

    async def _whole(
        self, request: web.Request, answer: Answer, script: Script, entry: Entry
    ) -> web.StreamResponse:
        if script.token_delay_s:
            for _ in range(answer.written):
                await asyncio.sleep(script.token_delay_s)
                entry.produce(1)
        else:
            entry.produce(answer.written)
        if script.die_after is not None:
            return self._die(request)
        if script.usage_shape != "none":
            entry.end(REPORTED)
        return _json(answer.whole(), script)

    async def _stream(
        self, request: web.Request, answer: Answer, script: Script, entry: Entry
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        if script.keep_alive_s:
            for _ in range(int(script.first_token_delay_s / script.keep_alive_s) + 1):
                await asyncio.sleep(script.keep_alive_s)
                await response.write(KEEP_ALIVE)
        written = 0
        for tokens, data in answer.events():
            if tokens and written == script.die_after:
                return self._die(request, response)
            if tokens and written == script.stall_after:
                await asyncio.Event().wait()
            if tokens and written == script.error_after:
                error = {"message": "scripted failure", "type": "InternalServerError", "code": 500}
                await response.write(event({"error": error}, script) + b"data: [DONE]\n\n")
                return response
            if tokens and written:
                await asyncio.sleep(script.token_delay_s)
            entry.produce(tokens)
            written += tokens
            await response.write(data)
        if script.usage_shape != "none":
            entry.end(REPORTED)
        return response

    def _die(self, request: web.Request, begun: web.StreamResponse | None = None) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return begun or web.Response()


class _Counted:
    """A request that runs, and how it ended."""

    def __init__(self, engine: FakeEngine, entry: Entry) -> None:
        self._engine, self._entry = engine, entry

    def __enter__(self) -> None:
        self._engine.running += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._engine.running -= 1
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            self._engine.aborted += 1
        self._entry.end(BROKEN)


def _json(data: Any, script: Script) -> web.Response:
    return web.Response(text=encoded(data, script), content_type="application/json")
