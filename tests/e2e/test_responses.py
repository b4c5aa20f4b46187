"""Conversations that the gateway keeps, at real engines: they are what a client would have sent itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from tests.e2e.conftest import Stack

pytestmark = pytest.mark.engine

ROLE = {"x-agent-role": "summarizer"}
TURNS = (
    ("assistant:bf16", "when is my bill due"),
    ("assistant:int8", "and how much"),
    ("assistant:bf16", "why"),
)
LIMITS: Any = {"max_output_tokens": 12, "temperature": 0, "extra_headers": ROLE}


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=stack.url + "/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.mark.parametrize("streamed", [False, True])
async def test_three_turns_of_which_the_second_is_another_variants(
    client: openai.AsyncOpenAI, streamed: bool
) -> None:
    whole: list[Any] = []
    previous: str | None = None
    for model, text in TURNS:
        asked: Any = {"model": model, "input": text, "previous_response_id": previous, **LIMITS}
        if streamed:
            async with client.responses.stream(**asked) as stream:
                done: Any = await stream.get_final_response()
        else:
            raw = await client.responses.with_raw_response.create(**asked)
            assert raw.headers["x-tiercel-variant"] == model
            done = raw.parse()
        whole.append({"role": "user", "content": text})
        by_hand = await client.responses.create(model=model, input=whole, store=False, **LIMITS)
        assert done.output_text == by_hand.output_text
        assert done.usage.input_tokens == by_hand.usage.input_tokens  # type: ignore[union-attr]
        assert done.previous_response_id == previous
        whole.append({"role": "assistant", "content": done.output_text})
        previous = done.id
    assert previous
    kept = await client.responses.retrieve(previous)
    assert kept.output_text == whole[-1]["content"]
    items = [item async for item in client.responses.input_items.list(previous, order="asc")]
    shown = [item.content[0].text for item in items]  # type: ignore[union-attr]
    assert shown == [message["content"] for message in whole[:-1]]


async def test_a_tools_output_goes_back(client: openai.AsyncOpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {"id": {"type": "string", "enum": ["a", "b"]}},
        "required": ["id"],
        "additionalProperties": False,
    }
    tools: Any = [{"type": "function", "name": "get_order", "parameters": parameters, "strict": True}]
    first = await client.responses.create(
        model="assistant:bf16",
        input="how much is order a",
        tools=tools,
        tool_choice="required",
        # A small model writes spaces to the end where it is not made to choose.
        **LIMITS | {"max_output_tokens": 400, "temperature": 1.0, "extra_body": {"seed": 4}},
    )
    calls = [item for item in first.output if item.type == "function_call"]
    assert calls
    outputs: Any = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "$5"} for call in calls
    ]
    second = await client.responses.create(
        model="assistant:int8", input=outputs, previous_response_id=first.id, **LIMITS
    )
    given: Any = [
        {"role": "user", "content": "how much is order a"},
        *(call.model_dump() for call in calls),
        *outputs,
    ]
    by_hand = await client.responses.create(model="assistant:int8", input=given, store=False, **LIMITS)
    assert second.output_text == by_hand.output_text
    assert second.usage
    assert by_hand.usage
    assert second.usage.input_tokens == by_hand.usage.input_tokens


async def test_in_the_background_and_cancelled(client: openai.AsyncOpenAI) -> None:
    queued = await client.responses.create(
        model="assistant:int8", input=TURNS[0][1], background=True, **LIMITS
    )
    assert queued.status == "queued"
    done: Any = queued
    async with asyncio.timeout(60):
        while done.status in ("queued", "in_progress"):
            await asyncio.sleep(0.05)
            done = await client.responses.retrieve(queued.id)
    assert done.status == "completed"
    direct = await client.responses.create(model="assistant:int8", input=TURNS[0][1], store=False, **LIMITS)
    assert done.output_text == direct.output_text
    long: Any = LIMITS | {"max_output_tokens": 900, "extra_body": {"ignore_eos": True}}
    running = await client.responses.create(model="assistant:int8", input="x", background=True, **long)
    assert (await client.responses.cancel(running.id)).status == "cancelled"
    assert (await client.responses.retrieve(running.id)).status == "cancelled"
