"""A stand-in for a vLLM engine, for tests and for trying the gateway without a model.

It speaks chat and text completions (streamed or not, with log-probabilities and usage), ``/health``
and ``/metrics`` with vLLM's names, stops when its client leaves, and misbehaves as its script says.

``python -m gateway.upstream.fake --port 8101`` runs one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

TOKEN_P = 0.9
"""Probability of every token that a fake engine says; its alternatives share half of the rest."""


@dataclass
class Script:
    """How a fake engine behaves; change it at any time."""

    text: str = "The total is $277."
    replies: list[str] = field(default_factory=list)
    """What it says instead, one after the other, as long as there are any."""
    first_token_delay_s: float = 0.0
    token_delay_s: float = 0.0
    status: int = 200
    """Any other status is answered with vLLM's error body."""
    message: str = "scripted failure"
    die_after: int | None = None
    """Cut the connection after so many tokens; 0 is before the first."""
    error_after: int | None = None
    """Send an error event after so many tokens of a stream, as vLLM does."""
    garbage: bool = False
    """Answer 200 with what is neither JSON nor an event."""
    healthy: bool = True
    echo: bool = False
    """Say the number in the last message, as ``<7>``, so that answers can be told apart."""
    disputes: str = ""
    """As a reference: hold every word with one of these letters unlikely when it is asked to score an
    answer."""
    knows_priority: bool = True
    """Whether it was started with priority scheduling; if not, it refuses requests that have one."""


class FakeEngine:
    """A fake engine and what it has seen."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
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
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/embeddings", self._embed)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        return app

    @asynccontextmanager
    async def serving(self, port: int = 0, host: str = "127.0.0.1") -> AsyncIterator[str]:
        """Serve while the block lasts; gives the base URL. Port 0 takes a free one."""
        runner = web.AppRunner(self.app(), handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, host, port)
            await site.start()
            yield f"http://{host}:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

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

    async def _embed(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        data = [
            {"object": "embedding", "index": index, "embedding": [0.5, 0.5, 0.5, float(len(text))]}
            for index, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
        return web.json_response({"object": "list", "model": "fake", "data": data, "usage": usage})

    async def _tokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"count": len(_prompt_tokens(await request.json()))})

    def _score(self, body: dict[str, Any]) -> web.Response:
        """As vLLM answers a request with ``prompt_logprobs``: the prompt's tokens, then those of the
        answer."""
        messages = body["messages"]
        prompt = _prompt_tokens({**body, "messages": messages[:-1]})
        said = _pieces(messages[-1]["content"])
        rows = [None, *({"1": _row(token, False)} for token in prompt[1:])]
        for number, token in enumerate(said):
            unlikely = any(letter in token for letter in self.script.disputes)
            row = {str(number + 2): _row(token, unlikely)}
            rows.append(
                {**row, "1": {"logprob": -0.01, "rank": 1, "decoded_token": "x"}} if unlikely else row
            )
        return web.json_response({"choices": [], "prompt_logprobs": rows})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(request.headers)
        self.running += 1
        try:
            return await self._answer(request, body)
        except (asyncio.CancelledError, ConnectionError):
            self.aborted += 1
            raise
        finally:
            self.running -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        script = self.script
        await asyncio.sleep(script.first_token_delay_s)
        if script.status != 200:
            error = {
                "message": script.message,
                "type": "BadRequestError",
                "param": None,
                "code": script.status,
            }
            return web.json_response({"error": error}, status=script.status)
        if body.get("priority") and not script.knows_priority:
            error = {"message": "Got priority 1000 but Priority scheduling is not enabled.", "code": 400}
            return web.json_response({"error": error}, status=400)
        if script.die_after == 0:
            return self._die(request)
        if script.garbage:
            return web.Response(text="<html>not an answer</html>\n\n", content_type="text/html")
        if body.get("prompt_logprobs") is not None:
            return self._score(body)
        text = script.replies.pop(0) if script.replies else script.text
        if script.echo:
            text = "<" + "".join(filter(str.isdigit, body["messages"][-1]["content"])) + ">"
        answer = _Answer(body, text, chat=request.path.startswith("/v1/chat"))
        if body.get("stream"):
            return await self._stream(request, answer)
        await asyncio.sleep(script.token_delay_s * len(answer.tokens))
        return self._die(request) if script.die_after is not None else web.json_response(answer.whole())

    async def _stream(self, request: web.Request, answer: _Answer) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for index in range(len(answer.tokens)):
            if index == self.script.die_after:
                return self._die(request, response)
            if index == self.script.error_after:
                error = {"message": "scripted failure", "type": "InternalServerError", "code": 500}
                await response.write(_event({"error": error}) + b"data: [DONE]\n\n")
                return response
            await response.write(_event(answer.chunk(index)))
            await asyncio.sleep(self.script.token_delay_s)
        if usage := answer.usage_chunk():
            await response.write(_event(usage))
        await response.write(b"data: [DONE]\n\n")
        return response

    def _die(self, request: web.Request, begun: web.StreamResponse | None = None) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return begun or web.Response()


class _Answer:
    """An answer in vLLM's shapes, cut into tokens at spaces."""

    def __init__(self, body: dict[str, Any], text: str, *, chat: bool) -> None:
        self._body = body
        self._chat = chat
        pieces = _pieces(text)
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or len(pieces)
        self.tokens = pieces[:limit]
        self._finish = "stop" if len(self.tokens) == len(pieces) else "length"

    def whole(self) -> dict[str, Any]:
        text = "".join(self.tokens)
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {
            "index": 0,
            **said,
            "logprobs": self._logprobs(self.tokens),
            "finish_reason": self._finish,
        }
        return {**self._head(""), "choices": [choice], "usage": self._usage(len(self.tokens))}

    def chunk(self, index: int) -> dict[str, Any]:
        token, last = self.tokens[index], index == len(self.tokens) - 1
        role = {"role": "assistant"} if index == 0 else {}
        said = {"delta": {**role, "content": token}} if self._chat else {"text": token}
        choice = {
            "index": 0,
            **said,
            "logprobs": self._logprobs([token]),
            "finish_reason": self._finish if last else None,
        }
        continuous = self._options().get("continuous_usage_stats")
        usage = {"usage": self._usage(index + 1)} if continuous else {}
        return {**self._head(".chunk"), "choices": [choice], **usage}

    def usage_chunk(self) -> dict[str, Any] | None:
        if not self._options().get("include_usage"):
            return None
        return {**self._head(".chunk"), "choices": [], "usage": self._usage(len(self.tokens))}

    def _options(self) -> dict[str, Any]:
        return self._body.get("stream_options") or {}

    def _head(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self._chat else "text_completion"
        return {"id": "fake-1", "object": kind, "created": 1, "model": self._body.get("model")}

    def _usage(self, tokens: int) -> dict[str, int]:
        prompt = len(_prompt_tokens(self._body))
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}

    def _logprobs(self, tokens: list[str]) -> dict[str, Any] | None:
        if not self._chat or not self._body.get("logprobs"):
            return None
        k = self._body.get("top_logprobs") or 0
        return {"content": [_logprob(token, k) for token in tokens]}


def _pieces(text: str) -> list[str]:
    return [word if index == 0 else " " + word for index, word in enumerate(text.split(" "))]


def _prompt_tokens(body: dict[str, Any]) -> list[str]:
    return json.dumps(body.get("messages") or body.get("prompt")).split()


def _row(token: str, unlikely: bool) -> dict[str, Any]:
    logprob, rank = (-12.0, 900) if unlikely else (math.log(TOKEN_P), 1)
    return {"logprob": logprob, "rank": rank, "decoded_token": token}


def _logprob(token: str, k: int) -> dict[str, Any]:
    rest = (1 - TOKEN_P) / 2 / max(1, k - 1)
    others = [{"token": f"alt{i}", "logprob": math.log(rest), "bytes": None} for i in range(1, k)]
    chosen = {"token": token, "logprob": math.log(TOKEN_P), "bytes": list(token.encode())}
    return {**chosen, "top_logprobs": [chosen, *others] if k else []}


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


async def _serve_forever(engine: FakeEngine, port: int) -> None:
    async with engine.serving(port) as url:
        print(f"fake engine at {url}", flush=True)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for a vLLM engine.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--text", default=Script.text, help="what it answers")
    parser.add_argument("--token-delay", type=float, default=0.02, help="seconds between tokens")
    options = parser.parse_args()
    script = Script(text=options.text, token_delay_s=options.token_delay)
    asyncio.run(_serve_forever(FakeEngine(script), options.port))


if __name__ == "__main__":
    main()
