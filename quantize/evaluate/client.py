"""The evaluator's way to an engine: vLLM's OpenAI-compatible HTTP interface, and one route of ours.

Anything that the engine computes differently from a fake-quantized model (kernels, KV cache,
defaults) is in these answers, which is the point of asking the engine. An engine that we started has a
route that hands out log-probabilities in binary (``score_route.py`` beside its entry); any other vLLM
answers in JSON, which is so slow that only the likeliest tokens are asked for.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import aiohttp

from quantize.evaluate.scores import Scored, from_rows, from_table

SCORE_ROUTE = "/tiercel/score"
WHOLE_VOCABULARY = 1 << 15
"""Vocabularies up to this size are kept whole: 128 KiB per scored token on disk at most."""
TOP = 1024
"""Likeliest tokens that are kept of a larger vocabulary, through our route."""
TOP_IN_JSON = 64
"""Likeliest tokens that are asked of an engine without it."""


class EngineError(RuntimeError):
    """The engine answered with an error, or not at all."""


class EngineClient:
    """One engine. Use as an async context manager; at most ``concurrency`` requests are in flight."""

    def __init__(self, base_url: str, model: str, concurrency: int = 24) -> None:
        self._base_url, self._model = base_url, model
        self._slots = asyncio.Semaphore(concurrency)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> EngineClient:
        # vLLM closes a connection that was idle for 5 s; ours must be the shorter patience.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300), connector=connector)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session:
            await self._session.close()

    async def answer(
        self,
        messages: Sequence[dict[str, str]],
        max_tokens: int,
        json_schema: Mapping[str, Any] | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> str:
        """The greedy answer to a conversation; with ``json_schema`` the engine guides it to be valid.

        ``template`` is for the chat template (vLLM's ``chat_template_kwargs``).
        """
        body: dict[str, Any] = {
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0,
            "seed": 0,
        }
        if json_schema is not None:
            schema = {"name": "answer", "schema": dict(json_schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if template:
            body["chat_template_kwargs"] = dict(template)
        reply = await self._post("/v1/chat/completions", body)
        return str(reply["choices"][0]["message"]["content"] or "")

    async def write(self, tokens: Sequence[int], count: int) -> int:
        """Have ``count`` tokens written after a prompt of token ids, whatever they are; how many were."""
        body = {"prompt": list(tokens), "max_tokens": count, "ignore_eos": True, "temperature": 0}
        return int((await self._post("/v1/completions", body))["usage"]["completion_tokens"])

    async def tokenize(
        self,
        messages: Sequence[dict[str, str]],
        add_generation_prompt: bool = False,
        template: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, by the engine's own chat template."""
        body: dict[str, Any] = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        if template:
            body["chat_template_kwargs"] = dict(template)
        return [int(token) for token in (await self._post("/tokenize", body))["tokens"]]

    async def vocabulary(self) -> int | None:
        """Tokens of the vocabulary, where the engine has our route; None where it has not."""
        try:
            return int((await self._get(SCORE_ROUTE))["vocabulary"])
        except EngineError as error:
            if " answered 404" in str(error):
                return None
            raise

    async def score(self, tokens: Sequence[int], start: int, vocabulary: int | None) -> Scored:
        """Log-probabilities of ``tokens[start:]``, each in its context; ``start`` is at least 1.

        ``vocabulary`` is what :meth:`vocabulary` returned: it decides how many are asked for.
        """
        if vocabulary is None:
            return await self.score_by_json(tokens, start, TOP_IN_JSON)
        return await self.score_by_route(tokens, start, vocabulary)

    async def score_by_json(self, tokens: Sequence[int], start: int, top: int) -> Scored:
        """By ``prompt_logprobs`` of vLLM's completions, the ``top`` likeliest tokens."""
        body = {"prompt": list(tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": top}
        rows = (await self._post("/v1/completions", body))["choices"][0]["prompt_logprobs"]
        kept = [{int(token): float(entry["logprob"]) for token, entry in row.items()} for row in rows[start:]]
        return from_rows(kept, tokens[start:])

    async def score_by_route(self, tokens: Sequence[int], start: int, vocabulary: int) -> Scored:
        """By our route: the whole vocabulary where it is small enough, else the :data:`TOP` likeliest."""
        import numpy as np

        top = 0 if vocabulary <= WHOLE_VOCABULARY else TOP
        body = {"tokens": list(tokens), "start": start, "top": top}
        async with self._slots:
            raw = await self._request("POST", SCORE_ROUTE, body)
        rows, columns = len(tokens) - start, top + 1 if top else vocabulary
        if len(raw) != rows * columns * (8 if top else 4):
            raise EngineError(
                f"{self._base_url}{SCORE_ROUTE} answered {len(raw)} bytes for {rows} rows of {columns}"
            )
        values = np.frombuffer(raw, "<f4", rows * columns).reshape(rows, columns)
        if not top:
            return from_table(values, tokens[start:])
        ids = np.frombuffer(raw, "<i4", offset=rows * columns * 4).reshape(rows, columns).copy()
        came = values[:, 0]
        ids[:, 0] = np.where((ids[:, 1:] == ids[:, :1]).any(axis=1), -1, ids[:, 0])  # else it is there twice
        return Scored(came, np.where(ids < 0, -np.inf, values).astype(np.float32), ids)

    async def version(self) -> str:
        return str((await self._get("/version"))["version"])

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with self._slots:
            return _json(await self._request("POST", path, {"model": self._model, **body}))

    async def _get(self, path: str) -> dict[str, Any]:
        return _json(await self._request("GET", path, None))

    async def _request(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        if self._session is None:
            raise EngineError("EngineClient is used outside of its context")
        url = self._base_url + path
        try:
            async with self._session.request(method, url, json=body) as response:
                if response.status != 200:
                    raise EngineError(f"{url} answered {response.status}: {(await response.text())[:300]}")
                return await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineError(f"{url}: {type(error).__name__}: {error}") from None


def _json(raw: bytes) -> dict[str, Any]:
    reply: dict[str, Any] = json.loads(raw)
    return reply
