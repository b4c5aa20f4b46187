"""A gateway in front of a provider of all dialects."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from dialects import ProviderServer, Script
from gateway_stack import Stack, running_gateway

KEY = "sk-very-secret-0123456789"
PASSWORD = "hunter2"
OPENAI, VLLM, CLAUDE, OLLAMA, GEMINI = "gpt", "mine", "claude", "llama", "gemini"
DIALECTS = (OPENAI, VLLM, CLAUDE, OLLAMA, GEMINI)
OSLO, ROME = {"city": "Oslo"}, {"city": "Rome"}


class Providers:
    """A gateway in front of a server of all dialects."""

    def __init__(self, stack: Stack, server: ProviderServer) -> None:
        self.stack = stack
        self.server = server

    def set(self, **how: Any) -> None:
        self.server.script = Script(**how)
        self.server.requests.clear()

    async def whole(self, model: str, **more: Any) -> Any:
        async with self.stack.post({"model": model, **more}) as response:
            text = await response.text()
            assert response.status == 200, (model, text)
            return json.loads(text)

    async def stream(self, model: str, **more: Any) -> list[Any]:
        """All events but the last one, which is ``[DONE]``."""
        async with self.stack.post({"model": model, "stream": True, **more}) as response:
            assert response.status == 200, (model, await response.text())
            *events, done = await self.stack.events(response)
        assert done == "[DONE]", (events, done)
        return events

    async def failed(self, model: str, **more: Any) -> tuple[int, Any, Any]:
        """Status, error and headers."""
        async with self.stack.post({"model": model, **more}) as response:
            text = await response.text()
            error = json.loads(text)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert "Traceback" not in text
            return response.status, error, response.headers

    def tokens(self, kind: str) -> float:
        """Of all models of providers."""
        return sum(
            sample.value
            for family in self.stack.registry.collect()
            for sample in family.samples
            if sample.name == "tiercel_tokens_total"
            and (sample.labels["variant"], sample.labels["kind"]) == ("provider", kind)
        )

    def requests(self, outcome: str) -> float:
        return self.stack.requests(outcome)


def entries(url: str) -> tuple[dict[str, Any], ...]:
    def entry(model: str, name: str, base: str) -> dict[str, Any]:
        return {"model": model, "litellm_model": name, "api_base": base, "api_key_env": "PROVIDER_KEY"}

    return (
        entry(OPENAI, "openai/gpt-large", url + "/v1"),
        entry(VLLM, "hosted_vllm/large", url + "/v1"),
        entry(CLAUDE, "anthropic/claude-large", url),
        entry(OLLAMA, "ollama_chat/llama-large", url),
        entry(GEMINI, "gemini/gemini-large", url + "/v1beta"),
    )


@asynccontextmanager
async def provided(**changes: Any) -> AsyncIterator[Providers]:
    server = ProviderServer()
    async with server.serving() as url, running_gateway(providers=entries(url), **changes) as stack:
        yield Providers(stack, server)
