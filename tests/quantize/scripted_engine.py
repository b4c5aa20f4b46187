"""A vLLM in a few lines: answers from a script, and log-probabilities that depend on what was asked.

With ``vocabulary`` it has the route for exact KL, as the engines that Tiercel starts; without, it is a stock
server: with ``by_ids`` one that runs the V2 model runner, which scores given tokens.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
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
        self,
        answer: Callable[[str], str],
        shift: float = 0.0,
        vocabulary: int | None = VOCABULARY,
        by_ids: bool = False,
        most: int = 64,
    ) -> None:
        self.answer, self.shift, self.vocabulary, self.by_ids = answer, shift, vocabulary, by_ids
        self.most = most
        self.asked: list[str] = []
        self.formats: list[Any] = []
        self.templates: list[Any] = []
        self.scored = 0
        self.fail_after: int | None = None

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/version", self._version)
        if self.by_ids:
            app.router.add_post("/inference/v1/generate", self._generate)
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
        answer = self.answer(text)
        choice: dict[str, Any] = {"message": {"content": answer}, "finish_reason": "stop"}
        if body.get("return_token_ids"):
            choice["token_ids"] = [*(ord(c) % VOCABULARY for c in answer), 0]
        self.templates.append(body.get("chat_template_kwargs"))
        return web.json_response({"choices": [choice]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        text = "".join(f"<{m['role'][0]}>{m['content']}." for m in body["messages"])
        text += "<a>" if body["add_generation_prompt"] else ""
        return web.json_response({"tokens": [ord(c) % VOCABULARY for c in text]})

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "scripted"})

    async def _describe(self, request: web.Request) -> web.Response:
        about = {"vocabulary": self.vocabulary, "width": VOCABULARY, "dtype": "float32", "head": "scripted"}
        return web.json_response(about)

    async def _score(self, request: web.Request) -> web.Response:
        """Its hidden states are its log-probabilities."""
        import numpy as np

        self.scored += 1
        line, _, data = (await request.read()).partition(b"\n")
        body = json.loads(line)
        tokens, start = body["tokens"], body["start"]
        rows = np.array([self.row(t) for t in tokens[start - 1 : -1]], "<f4")
        came = rows[np.arange(len(rows)), tokens[start:]].astype("<f8")
        columns = {"came": came.tobytes(), "top1": rows.argmax(1).astype("<i4").tobytes()}
        if data:
            before = np.frombuffer(data, "<f4").reshape(rows.shape).astype(np.float64)
            columns["kl"] = (np.exp(before) * (before - rows)).sum(1).clip(0).tobytes()
            columns["reference_top1"] = before.argmax(1).astype("<i4").tobytes()
        if body.get("keep"):
            columns["hidden"] = rows.tobytes()
        head = json.dumps({"columns": [[name, len(raw)] for name, raw in columns.items()]})
        return web.Response(body=head.encode() + b"\n" + b"".join(columns.values()))

    async def _generate(self, request: web.Request) -> web.Response:
        import numpy as np

        self.scored += 1
        body = await request.json()
        asked, tokens = body["sampling_params"], body["token_ids"]
        start, ids = asked["prompt_logprob_start"], np.array(asked["prompt_logprob_token_ids"])
        rows = np.array([self.row(t) for t in tokens[start:-1]])
        values = np.where(ids < 0, -np.inf, np.take_along_axis(rows, ids.clip(0), 1)).astype(np.float32)
        out = io.BytesIO()
        np.save(out, values)
        told: list[Any] = [None]
        for before in tokens[:-1]:
            row = self.row(before)
            best = max(range(VOCABULARY), key=lambda i: row[i])
            told.append({str(best): {"logprob": row[best]}})
        text = base64.b64encode(out.getvalue()).decode()
        return web.json_response({"prompt_token_id_logprobs": text, "prompt_logprobs": told})

    async def _completions(self, request: web.Request) -> web.Response:
        self.scored += 1
        body = await request.json()
        tokens, top = body["prompt"], body["prompt_logprobs"]
        if top > self.most:
            raise web.HTTPBadRequest(text=f"greater than max allowed: {self.most}")
        rows: list[Any] = [None]
        for before, came in itertools.pairwise(tokens):
            row = self.row(before)
            best = sorted(range(VOCABULARY), key=lambda i: -row[i])[:top]
            rows.append({str(i): {"logprob": row[i]} for i in {came, *best}})
        return web.json_response({"choices": [{"prompt_logprobs": rows}]})
