"""What agents send wrongly: the engine judges it, nothing of ours breaks over it, and labels stay few."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_stack import CHAT, Stack, eventually, running_gateway

from gateway.identity import hash_of
from gateway.upstream.fake import Call

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}},
}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
NAMED = {"type": "function", "function": {"name": "nobody"}}
PATHS = (CHAT, "/v1/messages", "/v1/responses")
"""Each with the fields that it needs."""
BASE: dict[str, dict[str, Any]] = {
    CHAT: {},
    "/v1/messages": {"max_tokens": 9},
    "/v1/responses": {"input": "hello", "store": True},
}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def with_parameters(schema: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "parameters": schema}}


DOUBLING = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(60)} | {"d60": {}}
"""2 ** 60 steps."""
ODD: dict[str, dict[str, Any]] = {
    "fields that nobody knows": {"x_new": {"a": [1]}, "reasoning": {"effort": 7}},
    "no tools": {"tools": []},
    "tools that are none": {"tools": [None, 7, {}, {"type": "function"}, {"type": "mcp"}]},
    "tools that are no list": {"tools": {"weather": {}}},
    "tools that are a word": {"tools": "weather"},
    "a choice without tools": {"tool_choice": "required"},
    "a choice of nobody": {"tools": [TOOL], "tool_choice": NAMED},
    "a choice that is a number": {"tools": [TOOL], "tool_choice": 7},
    "a choice that is empty": {"tools": [TOOL], "tool_choice": {}},
    "two tools of one name": {"tools": [TOOL, TOOL]},
    "an image": {"messages": [{"role": "user", "content": [IMAGE]}]},
    "a result of no call": {"messages": [{"role": "tool", "content": "5", "tool_call_id": "none"}]},
    "a result without an id": {"messages": [{"role": "tool", "content": None}]},
    "calls that are none": {"messages": [{"role": "assistant", "content": None, "tool_calls": [7, None]}]},
    "a schema that is deep": {"tools": [with_parameters(deep(180))]},
    "a schema that doubles": {"tools": [with_parameters({"$defs": DOUBLING, "$ref": "#/$defs/d0"})]},
    "a schema of itself": {"tools": [with_parameters({"$ref": "#"})]},
    "a schema that is elsewhere": {"tools": [with_parameters({"$ref": "http://127.0.0.1:1/schema"})]},
    "a pattern that takes for ever": {
        "tools": [with_parameters({"properties": {"city": {"pattern": "^(a+)+$"}}})]
    },
    "a schema that is long": {
        "tools": [with_parameters({"properties": {f"p{n}": {"type": "string"} for n in range(20_000)}})]
    },
    "a thousand tools": {"tools": [with_parameters({}) for _ in range(1000)]},
    "a schema that is no object": {"response_format": {"type": "json_schema", "json_schema": [1]}},
}


@pytest.mark.parametrize("path", PATHS)
async def test_what_is_odd_reaches_the_engine_as_it_is(path: str) -> None:
    """Every answer is looked at, and the engine calls the tool: its arguments are held against the schema."""
    async with running_gateway(quality={"sample_rate": 1.0}) as stack:
        engine = stack.engines["bf16"]
        engine.script.calls = (Call("weather", json.dumps({"city": "a" * 40 + "!"})),)
        for why, odd in ODD.items():
            async with stack.post(BASE[path] | odd, path) as response:
                assert response.status == 200, why
            sent = stack.asked("bf16")[-1]
            assert {name: sent[name] for name in odd} == odd, why
        await eventually(stack.settled, within_s=120)
        engine.script.calls = ()
        async with stack.post(BASE[path], path) as response:
            assert response.status == 200


@pytest.mark.parametrize("path", PATHS)
async def test_what_an_engine_says_to_it_is_what_the_client_reads(stack: Stack, path: str) -> None:
    engine = stack.engines["bf16"]
    engine.script.status = 400
    for words in (
        "At most 0 image(s) may be provided in one prompt.",
        "This model's maximum context length is 1024 tokens. However, you requested 9000 tokens.",
        "tool_choice: 'nobody' is not among the tools.",
    ):
        engine.script.message = words
        for stream in (False, True):
            asked = BASE[path] | {"tools": [TOOL], "tool_choice": NAMED, "stream": stream}
            async with stack.post(asked, path) as response:
                assert response.status == 400
                error = (await response.json())["error"]
            assert error["message"] == words


async def test_a_thousand_agents_make_no_labels() -> None:
    async with running_gateway(quality={"sample_rate": 0.0}, watch={"enabled": False}) as stack:
        sent: set[str] = set()

        async def ask(number: int) -> None:
            headers = {
                "x-agent-name": f"agent{number}",
                "x-session-id": f"session{number}",
                "baggage": f"gen_ai.agent.name=other{number}",
            }
            metadata = {"agent_role": f"role{number}", "session_id": f"s{number}"}
            sent.update((*headers.values(), *metadata.values(), f"other{number}", f"u{number}"))
            async with stack.post({"metadata": metadata, "user": f"u{number}"}, headers=headers) as response:
                assert response.status == 200

        def series() -> set[tuple[str, frozenset[tuple[str, str]]]]:
            return {
                (sample.name, frozenset(sample.labels.items()))
                for family in stack.registry.collect()
                for sample in family.samples
            }

        await ask(0)
        before = series()
        for number in range(1, 1000):
            await ask(number)
        new = [labels for _, labels in series() - before]
        assert not [value for labels in new for _, value in labels if value in sent]
        assert len(new) < 100, "besides what a first reading of the engines brings"
        labels = {"role": "core", "requested": "assistant", "variant": "bf16", "outcome": "200"}
        assert stack.sample("tiercel_requests_total", **labels) == 1000


async def test_a_sub_agent_that_claims_to_be_core_gets_no_more_than_its_key_allows() -> None:
    key = {"name": "aux", "sha256": hash_of("aux-secret"), "roles": ("summarizer",), "role": "summarizer"}
    async with running_gateway(keys=(key,)) as stack:
        claims = {"authorization": "Bearer aux-secret", "x-agent-role": "core", "x-agent-name": "core"}
        async with stack.post(headers=claims) as response:
            assert response.status == 200
            assert response.headers["x-tiercel-variant"] == "assistant:int8", "its own role, whatever it says"
        async with stack.post({"model": "core"}, headers=claims) as response:
            assert response.status == 200
            assert response.headers["x-tiercel-variant"] == "assistant:int8"
