"""``/v1/models``: what this key may name, how long it may be, in the form of whoever asks."""

from __future__ import annotations

from typing import Any

import anthropic
import openai
import pytest
from gateway_stack import Stack, make_cards, running_gateway

from gateway.identity import hash_of

ALL = [
    "assistant",
    "intent_classifier",
    "summarizer",
    "core",
    "assistant:bf16",
    "assistant:int8",
    "assistant:int4-kv8",
]


def key(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "sha256": hash_of(f"sk-{name}")} | more


async def models(stack: Stack, name: str | None = None, **headers: str) -> list[Any]:
    if name is not None:
        headers["authorization"] = f"Bearer sk-{name}"
    async with stack.http.get(stack.url + "/v1/models", headers=headers) as response:
        assert response.status == 200
        return list((await response.json())["data"])


async def ids(stack: Stack, name: str | None = None) -> list[str]:
    return [entry["id"] for entry in await models(stack, name)]


async def test_a_key_sees_what_it_may_use() -> None:
    keys = (
        key("open"),
        key("bound", role="summarizer"),
        key("few", roles=("summarizer", "core")),
        key("low", lowest="int8"),
        key("one", models=("assistant:int8",)),
    )
    async with running_gateway(keys=keys) as stack:
        assert await ids(stack, "open") == ALL
        assert [name for name in await ids(stack, "bound") if name in ALL[1:4]] == ["summarizer"]
        assert [name for name in await ids(stack, "few") if name in ALL[1:4]] == ["summarizer", "core"]
        assert "assistant:int4-kv8" not in await ids(stack, "low")
        assert "assistant:int8" in await ids(stack, "low")
        assert await ids(stack, "one") == ["assistant:int8"]
        async with stack.http.get(stack.url + "/v1/models") as response:
            assert response.status == 401
        headers = {"authorization": "Bearer sk-bound"}
        async with stack.http.get(stack.url + "/v1/models/core", headers=headers) as response:
            assert response.status == 404
            error = (await response.json())["error"]
            assert error["code"] == "model_not_found"
            assert "core" not in error["message"].partition("use one of")[2]


async def test_how_long_a_request_may_be() -> None:
    cards = make_cards()
    cards["assistant:int8"] = cards["assistant:int8"].model_copy(update={"max_model_len": 512})
    async with running_gateway(cards=cards, engine={"max_model_len": 800}) as stack:
        longest = {entry["id"]: entry["max_model_len"] for entry in await models(stack)}
    assert longest["assistant:bf16"] == 800, "the engine's setting is below what the card allows"
    assert longest["assistant:int8"] == longest["summarizer"] == 512
    assert longest["core"] == 800, "int8 does not serve it"
    assert longest["assistant"] == 512


async def test_one_model_and_the_aliases(stack: Stack) -> None:
    for path in ("/v1/models/assistant:int8", "/models/assistant:int8"):
        async with stack.http.get(stack.url + path) as response:
            entry = await response.json()
            assert (entry["id"], entry["object"], entry["max_model_len"]) == ("assistant:int8", "model", 1024)
    for path in ("/models", "/v1/models/", "/models/"):
        async with stack.http.get(stack.url + path) as response:
            assert [entry["id"] for entry in (await response.json())["data"]] == ALL
    async with stack.http.get(stack.url + "/v1/models/nothing") as response:
        assert response.status == 404
        assert "use one of: assistant" in (await response.json())["error"]["message"]


async def test_official_clients(stack: Stack) -> None:
    async with openai.AsyncOpenAI(base_url=stack.url + "/v1", api_key="any", max_retries=0) as client:
        assert [model.id async for model in client.models.list()] == ALL
        assert (await client.models.retrieve("core")).id == "core"
    async with anthropic.AsyncAnthropic(base_url=stack.url, api_key="any", max_retries=0) as client:
        assert [model.id async for model in client.models.list()] == ALL
        found = await client.models.retrieve("core")
        assert (found.id, found.type, found.created_at.year > 2000) == ("core", "model", True)
        assert [model.id async for model in client.models.list(limit=2)] == ALL, "page by page"
        back = await client.models.list(before_id="core", limit=2)
        assert [model.id for model in back.data] == ["intent_classifier", "summarizer"]
        assert back.has_more
        with pytest.raises(anthropic.NotFoundError) as error:
            await client.models.retrieve("nothing")
        assert error.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
        assert error.value.request_id
