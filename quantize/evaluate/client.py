"""The evaluator's way to an engine: vLLM's OpenAI-compatible HTTP interface, nothing else.

Anything that the engine computes differently from a fake-quantized model (kernels, KV cache,
defaults) is in these answers, which is the point of asking the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import aiohttp

TokenScores = dict[int, float]
"""Token id to natural-log probability, of the most likely tokens and the one that came."""


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

    async def answer(self, messages: Sequence[dict[str, str]], max_tokens: int) -> str:
        """The greedy answer to a conversation."""
        body = {"messages": list(messages), "max_tokens": max_tokens, "temperature": 0, "seed": 0}
        reply = await self._post("/v1/chat/completions", body)
        return str(reply["choices"][0]["message"]["content"] or "")

    async def tokenize(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False
    ) -> list[int]:
        """Token ids of a conversation, by the engine's own chat template."""
        body = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        return [int(token) for token in (await self._post("/tokenize", body))["tokens"]]

    async def score(self, tokens: Sequence[int], top: int) -> list[TokenScores]:
        """For every token but the first: log-probabilities of the ``top`` likeliest and of itself."""
        body = {"prompt": list(tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": top}
        rows = (await self._post("/v1/completions", body))["choices"][0]["prompt_logprobs"]
        return [{int(token): float(entry["logprob"]) for token, entry in row.items()} for row in rows[1:]]

    async def version(self) -> str:
        return str((await self._get("/version"))["version"])

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with self._slots:
            return await self._request("POST", path, {"model": self._model, **body})

    async def _get(self, path: str) -> dict[str, Any]:
        return await self._request("GET", path, None)

    async def _request(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        if self._session is None:
            raise EngineError("EngineClient is used outside of its context")
        url = self._base_url + path
        try:
            async with self._session.request(method, url, json=body) as response:
                if response.status != 200:
                    raise EngineError(f"{url} answered {response.status}: {(await response.text())[:300]}")
                reply: dict[str, Any] = await response.json()
                return reply
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineError(f"{url}: {type(error).__name__}: {error}") from None
