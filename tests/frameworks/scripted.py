"""What the scripted engines answer to the questions of the recipes: by the request alone, in any protocol.

========================================  ==========================================================
asked                                     answered
========================================  ==========================================================
Say hello.                                ``Hello from <variant>, spoken in several pieces.``
the weather in Oslo (and in Bonn)         a use of the weather tool per city, all in one answer; once the
                                          tools have answered, their words
anything, with a schema to be held to     the smallest object that the schema allows
Count to a thousand.                      three words, then silence, until the client leaves
========================================  ==========================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gateway.upstream.fake import Call, Script

CITIES = ("Oslo", "Bonn")
ENDS = ("final_answer", "final_result")
"""Tools by which frameworks have a model say that it is done."""


@dataclass
class Asked:
    """A request, whichever protocol it came in."""

    question: str = ""
    """What the user said last."""
    results: list[str] = field(default_factory=list)
    """What tools have answered since."""
    tools: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name, the schemas of their arguments."""
    forced: str | None = None
    """The tool that has to be used; ``""`` is any."""
    schema: dict[str, Any] | None = None
    """Of the answer."""
    open_calls: dict[str, str] = field(default_factory=dict)
    """Names of the tools that were used since the question, by the ids of their calls."""
    answered: list[str] = field(default_factory=list)
    """Ids of the calls that ``results`` belong to."""


def read(body: dict[str, Any]) -> Asked:
    """What is asked."""
    asked = Asked(schema=_schema(body), forced=_forced(body.get("tool_choice")))
    for tool in body.get("tools") or ():
        given = tool.get("function") or tool
        if "name" in given:
            schema = given.get("parameters") or given.get("input_schema") or {}
            asked.tools[given["name"]] = schema
    given = body.get("messages") or body.get("input") or []
    for message in [{"role": "user", "content": given}] if isinstance(given, str) else given:
        _take(asked, message)
    return asked


def _take(asked: Asked, message: dict[str, Any]) -> None:
    kind, role = message.get("type"), message.get("role")
    if kind == "function_call_output" or role == "tool":
        asked.answered.append(message.get("call_id") or message.get("tool_call_id") or "")
        asked.results.append(text_of(message.get("output") or message.get("content")))
    elif kind == "function_call":
        asked.open_calls[message["call_id"]] = message["name"]
    elif role == "assistant":
        for call in message.get("tool_calls") or ():
            asked.open_calls[call["id"]] = call["function"]["name"]
        for block in _blocks(message.get("content")):
            if block.get("type") == "tool_use":
                asked.open_calls[block["id"]] = block["name"]
    elif role == "user":
        results = [block for block in _blocks(message.get("content")) if block.get("type") == "tool_result"]
        for block in results:
            asked.answered.append(block["tool_use_id"])
            asked.results.append(text_of(block.get("content")))
        said = text_of(message.get("content"))
        if said.startswith("Observation:"):  # as smolagents hands on what tools have said
            asked.results.append(said)
        elif not results:
            asked.question = said
            asked.results, asked.answered, asked.open_calls = [], [], {}


def script_for(variant: str, body: dict[str, Any]) -> Script:
    """What the engine of ``variant`` does with a request."""
    asked = read(body)
    calls = tuple(_calls(asked))
    if calls:
        return Script(calls=calls)
    if asked.schema is not None:
        return Script(text=json.dumps(smallest(asked.schema)))
    if asked.results:
        return Script(text="It is so: " + "; ".join(asked.results))
    if "Count to a thousand" in asked.question:
        return Script(text="one two three four five six", stall_after=3)
    return Script(text=hello(variant))


def hello(variant: str) -> str:
    return f"Hello from {variant}, spoken in several pieces."


def _calls(asked: Asked) -> Iterator[Call]:
    end = next((name for name in asked.tools if name in ENDS), None)
    if asked.forced:
        yield Call(asked.forced, json.dumps(smallest(asked.tools[asked.forced])))
        return
    if not asked.results:
        weather = next((name for name in asked.tools if "weather" in name), None)
        cities = [city for city in CITIES if city in asked.question]
        if weather is not None and "weather" in asked.question and cities:
            (parameter, *_) = asked.tools[weather]["properties"]
            for city in cities:
                yield Call(weather, json.dumps({parameter: city}))
            return
    if end is not None:
        given = smallest(asked.tools[end])
        if asked.results and list(given) == ["answer"]:
            given = {"answer": "It is so: " + "; ".join(asked.results)}
        yield Call(end, json.dumps(given))
    elif asked.forced is not None and not asked.results:
        name = next(iter(asked.tools))
        yield Call(name, json.dumps(smallest(asked.tools[name])))


def smallest(schema: dict[str, Any], root: dict[str, Any] | None = None) -> Any:
    """A value that a schema allows: the first of what it lists, else a word or a number."""
    root = schema if root is None else root
    if "$ref" in schema:
        found: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        return smallest(found, root)
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return smallest(schema[several][0], root)
    if "const" in schema or "enum" in schema:
        return schema.get("const", (schema.get("enum") or [None])[0])
    kind = schema.get("type")
    if kind == "object" or "properties" in schema:
        needed = schema.get("required", schema.get("properties", {}))
        return {name: smallest(schema["properties"][name], root) for name in needed}
    plain: dict[Any, Any] = {"array": [], "integer": 21, "number": 21.5, "boolean": True, "null": None}
    return plain.get(kind, "Oslo")


def text_of(content: Any) -> str:
    """The text of a message, in one piece or in blocks."""
    if isinstance(content, str):
        return content
    return " ".join(block["text"] for block in _blocks(content) if isinstance(block.get("text"), str))


def _blocks(content: Any) -> list[dict[str, Any]]:
    return [block for block in content if isinstance(block, dict)] if isinstance(content, list) else []


def _schema(body: dict[str, Any]) -> dict[str, Any] | None:
    asked = body.get("response_format") or (body.get("text") or {}).get("format")
    asked = asked or (body.get("output_config") or {}).get("format") or body.get("output_format") or {}
    if asked.get("type") != "json_schema":
        return None
    schema: dict[str, Any] = (asked.get("json_schema") or asked)["schema"]
    return schema


def _forced(choice: Any) -> str | None:
    if choice in ("required", "any"):
        return ""
    if not isinstance(choice, dict) or choice.get("type") not in ("function", "tool", "any"):
        return None
    return (choice.get("function") or choice).get("name", "")
