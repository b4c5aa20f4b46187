"""A vLLM in a few lines: answers from a script, and log-probabilities that depend on what was asked.

With ``vocabulary`` it has the route for whole rows, as the engines that Tiercel starts; without, it is a
stock server, which knows ``prompt_logprobs`` alone.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

VOCABULARY = 96


class ScriptedEngine:
    """``answer`` maps the last message's text to an answer; ``shift`` moves every log-probability."""

    def __init__(
        self, answer: Callable[[str], str], shift: float = 0.0, vocabulary: int | None = VOCABULARY
    ) -> None:
        self.answer, self.shift, self.vocabulary = answer, shift, vocabulary
        self.asked: list[str] = []
        self.formats: list[Any] = []
        self.scored = 0
        self.fail_after: int | None = None

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/version", self._version)
        if self.vocabulary:
            app.router.add_get("/tiercel/score", self._describe)
            app.router.add_post("/tiercel/score", self._score)
        async with TestServer(app) as server:
            yield str(server.make_url("")).rstrip("/")

    def row(self, token_before: int) -> list[float]:
        """Natural-log probabilities of what follows a token: sharp, and a little different when shifted."""
        draw = random.Random(token_before)
        logits = [draw.gauss(0, 2) + self.shift * math.sin(i) for i in range(VOCABULARY)]
        total = math.log(sum(math.exp(x) for x in logits))
        return [x - total for x in logits]

    async def _chat(self, request: web.Request) -> web.Response:
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            raise web.HTTPInternalServerError(text="the engine died")
        body = await request.json()
        text = body["messages"][-1]["content"]
        self.asked.append(text)
        self.formats.append(body.get("response_format"))
        return web.json_response({"choices": [{"message": {"content": self.answer(text)}}]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        text = "".join(f"<{m['role'][0]}>{m['content']}." for m in body["messages"])
        text += "<a>" if body["add_generation_prompt"] else ""
        return web.json_response({"tokens": [ord(c) % VOCABULARY for c in text]})

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "scripted"})

    async def _describe(self, request: web.Request) -> web.Response:
        return web.json_response({"vocabulary": self.vocabulary})

    async def _score(self, request: web.Request) -> web.Response:
        import numpy as np

        self.scored += 1
        body = await request.json()
        tokens, start, top = body["tokens"], body["start"], body["top"]
        rows = np.array([self.row(t) for t in tokens[start - 1 : -1]], "<f4")
        if not top:
            return web.Response(body=rows.tobytes())
        order = np.argsort(-rows, axis=1)[:, :top]
        ids = np.concatenate([np.array(tokens[start:])[:, None], order], axis=1)
        values = np.take_along_axis(rows, ids, axis=1)
        return web.Response(body=values.tobytes() + ids.astype("<i4").tobytes())

    async def _completions(self, request: web.Request) -> web.Response:
        self.scored += 1
        body = await request.json()
        tokens, top = body["prompt"], body["prompt_logprobs"]
        rows: list[Any] = [None]
        for before, came in itertools.pairwise(tokens):
            row = self.row(before)
            best = sorted(range(VOCABULARY), key=lambda i: -row[i])[:top]
            rows.append({str(i): {"logprob": row[i]} for i in {came, *best}})
        return web.json_response({"choices": [{"prompt_logprobs": rows}]})
