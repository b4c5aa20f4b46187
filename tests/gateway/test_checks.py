"""Checks that need no model: what they find, what they leave alone, and what they make of nonsense."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.quality import checks
from gateway.quality.schemas import Schemas
from gateway.quality.transcript import Transcript

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PRICE = {"type": "object", "properties": {"price": {"type": "number"}}, "required": ["price"]}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "price", "schema": PRICE}}


def body(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hello"}], **more}


def failures(request: dict[str, Any], made: Transcript) -> dict[str, bool]:
    return checks.failures(request, made, Schemas())


def answer(text: str | None = None, finish: str = "stop", **message: Any) -> Transcript:
    whole = {"choices": [{"message": {"content": text, **message}, "finish_reason": finish}]}
    return Transcript.of([json.dumps(whole).encode()])


def call(name: str, arguments: str) -> Transcript:
    return answer(None, "tool_calls", tool_calls=[{"function": {"name": name, "arguments": arguments}}])


@pytest.mark.parametrize(
    ("check", "asked", "given", "bad"),
    [
        ("json", {"response_format": SCHEMA}, answer('{"price": 3}'), False),
        ("json", {"response_format": SCHEMA}, answer('{"price": "three"}'), True),
        ("json", {"response_format": SCHEMA}, answer("the price is 3"), True),
        ("json", {"response_format": SCHEMA}, answer('{"price": ', "length"), None),
        ("json", {"response_format": {"type": "json_object"}}, answer("[1]"), True),
        ("json", {"response_format": {"type": "text"}}, answer("[1"), None),
        (
            "json",
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            answer("{}"),
            False,
        ),
        ("json", {}, answer("no"), None),
        (
            "json",
            {"response_format": SCHEMA, "tools": [WEATHER]},
            answer(
                "Let me look.",
                "tool_calls",
                tool_calls=[{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
            ),
            None,
        ),
        ("tool", {"tools": [WEATHER]}, call("weather", '{"city": "Oslo"}'), False),
        ("tool", {"tools": [WEATHER]}, call("whether", "{}"), True),
        ("tool", {}, call("weather", "{}"), True),
        ("tool", {"tools": [WEATHER]}, answer("Rain."), None),
        ("arguments", {"tools": [WEATHER]}, call("weather", '{"city": "Oslo"}'), False),
        ("arguments", {"tools": [WEATHER]}, call("weather", '{"town": "Oslo"}'), True),
        ("arguments", {"tools": [WEATHER]}, call("weather", '{"city": '), True),
        ("repetition", {}, answer("I see a cat. " * 5), True),
        ("repetition", {}, answer("very " * 9), True),
        ("repetition", {}, answer("ha ha ha"), False),
        ("repetition", {}, answer("Vidalo" + "o" * 16), True),
        ("repetition", {}, answer("| a | b |\n|" + "-" * 40 + "|"), False),
        ("repetition", {}, answer("| a | b |\n|" + " --- |" * 12), False),
        ("repetition", {}, answer("!" * 64), True),
        ("repetition", {}, answer("Wait" + "." * 40), False),
        ("repetition", {}, answer("one two three four five six seven eight nine ten " * 2), False),
        ("truncation", {}, answer("and then", "length"), True),
        ("truncation", {}, answer("The end."), False),
        ("empty", {}, answer("  \n"), True),
        ("empty", {}, answer("", reasoning="hm"), False),
        ("empty", {"tools": [WEATHER]}, call("weather", "{}"), False),
        ("refusal", {}, answer("I'm sorry, but I cannot help with that."), True),
        ("refusal", {}, answer("Sorry is a word. It has five letters."), False),
        (
            "invented",
            {"messages": [{"role": "user", "content": "Order 48210, total $277"}]},
            answer("Order 48211."),
            True,
        ),
        (
            "invented",
            {"messages": [{"role": "user", "content": "Order 48210, total $277"}]},
            answer("It is 277 dollars for 48210, in 2 parts."),
            False,
        ),
        ("invented", {}, answer("Water boils at 373 kelvin."), None),
    ],
)
def test_a_check(check: str, asked: dict[str, Any], given: Transcript, bad: bool | None) -> None:
    assert failures(body(**asked), given).get(check) is bad


def test_a_stream_is_checked_like_a_whole_answer() -> None:
    made = Transcript()
    for part in (
        {"tool_calls": [{"index": 0, "function": {"name": "weather", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"ci'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": 'ty": "Oslo"}'}}]},
        {"tool_calls": [{"index": 1, "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}]},
    ):
        made.add({"choices": [{"index": 0, "delta": part}]})
    made.add({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    assert made.tool_calls == [("weather", '{"city": "Oslo"}'), ("weather", '{"city": "Bonn"}')]
    assert failures(body(tools=[WEATHER]), made) == {
        "tool": False,
        "arguments": False,
        "truncation": False,
        "empty": False,
    }


NONSENSE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(["tools", "response_format", "tool_choice"]), NONSENSE, max_size=3),
    st.text(max_size=200),
)
def test_nonsense_is_no_failure_of_ours(asked: dict[str, Any], text: str) -> None:
    found = failures(body(**asked), answer(text))
    assert all(isinstance(bad, bool) for bad in found.values())


def test_no_values_are_looked_for_in_what_takes_too_long() -> None:
    """A table of some megabytes: that took as long as a process may take for all checks."""
    table = "\n".join(f"ORD-{number},{number}.50,2024-03-15" for number in range(100_000, 130_000))
    asked = {"messages": [{"role": "user", "content": table}]}
    began = time.process_time()
    assert "invented" not in failures(asked, answer("ORD-999999 costs 12,345.50."))
    assert time.process_time() - began < 0.3
