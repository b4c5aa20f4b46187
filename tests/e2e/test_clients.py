"""The official OpenAI and Anthropic clients against real engines, through the gateway."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

from tests.e2e.conftest import ROOT, Stack

pytestmark = pytest.mark.engine

SYSTEM = "Classify the intent of the message."
ASKED = "when is my credit card bill due"
MESSAGES: Any = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ASKED}]
OPENAPI = ROOT.parent / "shared/data/openai_openapi.json.gz"


def tool(name: str) -> dict[str, Any]:
    identity = {"type": "string", "enum": ["a", "b"]}
    parameters = {
        "type": "object",
        "properties": {"id": identity},
        "required": ["id"],
        "additionalProperties": False,
    }
    # Strict, since the small model has never seen a tool: only a grammar makes it call one.
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": True}}


TOOLS: Any = [tool("get_order"), tool("get_customer")]
SCHEMA: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"count": {"type": "integer", "enum": [1, 2]}, "sure": {"type": "boolean"}},
            "required": ["count", "sure"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=stack.url + "/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.fixture
async def claude(stack: Stack) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=stack.url, api_key="any", max_retries=0) as made:
        yield made


async def test_a_named_tool(client: openai.AsyncOpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_customer"}}
    answer = await client.chat.completions.create(
        model="assistant",
        messages=MESSAGES,
        tools=TOOLS,
        tool_choice=choice,
        max_tokens=400,
        temperature=1.0,
        seed=4,
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_customer"


@pytest.mark.parametrize("stream", [False, True])
async def test_tools_that_are_required(client: openai.AsyncOpenAI, stream: bool) -> None:
    """One call or several, as the engine's grammar allows; deltas are put together by their index."""
    asked: Any = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 400, "temperature": 1.0, "seed": 4}
    calls: dict[int, list[str]] = {}
    if stream:
        chunks = await client.chat.completions.create(
            model="assistant", messages=MESSAGES, stream=True, parallel_tool_calls=True, **asked
        )
        async for chunk in chunks:
            assert chunk.usage is None, "nobody asked for it"
            for delta in chunk.choices[0].delta.tool_calls or ():
                parts = calls.setdefault(delta.index, ["", ""])
                parts[0] += delta.function.name or ""
                parts[1] += delta.function.arguments or ""
    else:
        answer = await client.chat.completions.create(
            model="assistant", messages=MESSAGES, parallel_tool_calls=True, **asked
        )
        for index, call in enumerate(answer.choices[0].message.tool_calls or ()):
            calls[index] = [call.function.name, call.function.arguments]
    assert calls
    assert sorted(calls) == list(range(len(calls)))
    assert {name for name, _ in calls.values()} <= {"get_order", "get_customer"}


async def test_an_answer_in_a_schema(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="intent_classifier", messages=MESSAGES, response_format=SCHEMA, max_tokens=400
    )
    found = json.loads(answer.choices[0].message.content or "")
    assert set(found) == {"count", "sure"}


async def test_several_answers_with_log_probabilities(client: openai.AsyncOpenAI) -> None:
    asked: Any = {"n": 3, "seed": 5, "temperature": 1.0, "max_tokens": 8}
    whole = await client.chat.completions.create(
        model="assistant", messages=MESSAGES, logprobs=True, top_logprobs=2, **asked
    )
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    for choice in whole.choices:
        assert choice.logprobs
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content or ())
    texts = dict.fromkeys(range(3), "")
    stream = await client.chat.completions.create(
        model="assistant", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **asked
    )
    usage = None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert choice.logprobs is None
            texts[choice.index] += choice.delta.content or ""
    assert list(texts.values()) == [choice.message.content for choice in whole.choices], "the same seed"
    assert whole.usage
    assert usage
    assert usage.completion_tokens == whole.usage.completion_tokens


async def test_text_completions(client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(
        model="assistant", prompt="the order", max_tokens=6, temperature=0
    )
    stream = await client.completions.create(
        model="assistant", prompt="the order", max_tokens=6, temperature=0, stream=True
    )
    text = "".join([chunk.choices[0].text async for chunk in stream])
    assert text == whole.choices[0].text


async def test_responses(client: openai.AsyncOpenAI) -> None:
    asked: Any = {
        "model": "intent_classifier",
        "instructions": SYSTEM,
        "input": ASKED,
        "max_output_tokens": 10,
        "temperature": 0,
    }
    whole = await client.responses.with_raw_response.create(**asked)
    assert whole.headers["x-tiercel-route-reason"] == "cheapest_in_budget"
    parsed = whole.parse()
    assert parsed.output_text
    assert parsed.usage
    async with client.responses.stream(**asked) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert final.output_text == parsed.output_text
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"


async def test_messages(claude: anthropic.AsyncAnthropic) -> None:
    asked: Any = {
        "model": "intent_classifier",
        "max_tokens": 10,
        "system": SYSTEM,
        "messages": [{"role": "user", "content": ASKED}],
        "extra_body": {"temperature": 0},
    }
    whole = await claude.messages.create(**asked)
    assert whole.content[0].type == "text"
    async with claude.messages.stream(**asked) as stream:
        text = "".join([part async for part in stream.text_stream])
        final = await stream.get_final_message()
    assert text == whole.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens
    counted = await claude.messages.count_tokens(model="assistant", messages=asked["messages"])
    assert counted.input_tokens > 0
    with pytest.raises(anthropic.NotFoundError):
        await claude.messages.create(**asked | {"model": "nothing"})


async def test_tokens_and_what_these_engines_do_not_serve(stack: Stack, http: aiohttp.ClientSession) -> None:
    async with http.post(stack.url + "/tokenize", json={"model": "assistant", "prompt": "hello"}) as response:
        tokens = (await response.json())["tokens"]
    body = {"model": "assistant", "tokens": tokens}
    async with http.post(stack.url + "/v1/detokenize", json=body) as response:
        assert (await response.json())["prompt"] == "hello"
    async with http.post(stack.url + "/v1/embeddings", json={"model": "assistant", "input": "a"}) as response:
        assert response.status == 404
        assert "do not serve /v1/embeddings" in (await response.json())["error"]["message"]


async def test_tokens_of_responses_and_messages_are_counted(
    stack: Stack, http: aiohttp.ClientSession, client: openai.AsyncOpenAI, claude: anthropic.AsyncAnthropic
) -> None:
    async def used() -> float:
        async with http.get(stack.url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith("tiercel_tokens_total") and 'kind="completion"' in line
        )

    before = await used()
    whole = await client.responses.create(model="assistant", input=ASKED, max_output_tokens=7)
    assert whole.usage
    async with claude.messages.stream(
        model="assistant", max_tokens=7, messages=[{"role": "user", "content": ASKED}]
    ) as stream:
        final = await stream.get_final_message()
    assert await used() - before == whole.usage.output_tokens + final.usage.output_tokens


@pytest.mark.skipif(not OPENAPI.exists(), reason=f"OpenAI's document is not at {OPENAPI}")
async def test_answers_are_what_openais_document_says(stack: Stack, http: aiohttp.ClientSession) -> None:
    """But for nulls: vLLM writes them for what it leaves out, where the document wants nothing."""
    from jsonschema import Draft202012Validator
    from referencing import Registry, Resource
    from referencing.jsonschema import DRAFT202012

    document = json.loads(gzip.decompress(OPENAPI.read_bytes()))
    resource = Resource.from_contents(document, default_specification=DRAFT202012)
    registry: Any = Registry().with_resource("urn:openai", resource)

    def problems(schema: str, answer: Any) -> list[str]:
        where = {"$ref": f"urn:openai#/components/schemas/{schema}"}
        found = Draft202012Validator(where, registry=registry).iter_errors(answer)
        return [
            f"{list(error.absolute_path)}: {error.message[:200]}"
            for error in found
            if error.instance is not None
        ]

    async def post(path: str, **body: Any) -> str:
        async with http.post(stack.url + path, json={"model": "assistant", **body}) as response:
            return await response.text()

    chat = {"messages": MESSAGES, "max_tokens": 4}
    whole = json.loads(await post("/v1/chat/completions", **chat))
    assert problems("CreateChatCompletionResponse", whole) == []
    for line in (await post("/v1/chat/completions", **chat, stream=True)).splitlines():
        if line.startswith("data: {"):
            assert problems("CreateChatCompletionStreamResponse", json.loads(line[6:])) == [], line
    text = json.loads(await post("/v1/completions", prompt="a", max_tokens=4))
    assert problems("CreateCompletionResponse", text) == []
    async with http.get(stack.url + "/v1/models") as response:
        assert problems("ListModelsResponse", await response.json()) == []
    ours = json.loads(await post("/v1/chat/completions", **chat, model="nobody's"))
    assert problems("ErrorResponse", ours) == []
    # What is the engine's to refuse has vLLM's own words, whose code is a number.
    theirs = json.loads(await post("/v1/chat/completions"))["error"]
    assert (theirs["code"], bool(theirs["message"])) == (400, True)
