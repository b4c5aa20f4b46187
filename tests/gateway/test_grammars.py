"""Patterns that would keep an engine busy are refused before one sees them, and no others are."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

import pytest
from gateway_stack import Stack, running_gateway
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import BadRequestError
from gateway.proxy import grammars
from gateway.proxy.body import Body, Reads
from gateway.proxy.grammars import MOST, Bounds, Look, expanded
from gateway.proxy.large import LargeReader

BOMB = "^(a{1,9999}){1,9999}$"
BOUNDS = Bounds(pattern=1000, counted=50_000)
MESSAGES = [{"role": "user", "content": "hi"}]
Part = tuple[str, int]
"""A pattern, and its size."""


def done(steps: Generator[None, None, Any]) -> Any:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def schema(pattern: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"code": {"type": "string", "pattern": pattern}}}


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("", 0),
        ("abc", 3),
        ("^a{1,2000}$", 2000),
        (r"\^{3}", 3),
        (r"\d{3}-\d{4}", 8),
        ("[a-z]{1,10}", 10),
        (r"[\]]{3}", 3),
        ("(ab|c){2}x", 7),
        ("(a{2}b){3}", 9),
        ("a{3}{4}", 12),
        ("x{5,}", 5),
        ("x{,5}", 5),
        ("(a+)*b?", 2),
        ("{3}", 0),
        ("a{b}", 4),
        ("a{0}", 1),
        ("(a", 1),
        ("a)b", 2),
        ("ab::=x{2}", 7),
        ("start: A~2..7", 14),
        ("(a{1,9999}){1,9999}", 9999 * 9999),
        ("(" * 500 + "a{9}" + "){9}" * 500, MOST),
        ("a{" + "9" * 10_000 + "}", MOST),
    ],
)
def test_the_size_of_a_pattern_is_that_of_what_it_stands_for(pattern: str, size: int) -> None:
    assert done(expanded(pattern)) == size


def _repeated(part: Part, low: int, more: int) -> Part:
    return f"({part[0]}){{{low},{low + more}}}", part[1] * max(1, low + more)


def _joined(parts: list[Part], by: str) -> Part:
    return by.join(text for text, _ in parts), sum(size for _, size in parts)


PARTS: st.SearchStrategy[Part] = st.recursive(
    st.sampled_from([("a", 1), (r"\{", 1), ("[{3}]", 1), (r"\d", 1), ("b*", 1), (".+?", 1)]),
    lambda inner: st.one_of(
        st.builds(_repeated, inner, st.integers(0, 30), st.integers(0, 30)),
        st.builds(_joined, st.lists(inner, min_size=1, max_size=4), st.sampled_from(["", "|"])),
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(PARTS)
def test_it_is_the_sum_of_parts_and_a_product_of_repetitions(part: Part) -> None:
    pattern, size = part
    assert done(expanded(pattern)) == min(size, MOST)


def refused(body: dict[str, Any] | bytes) -> str | None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    look = Look(BOUNDS)
    try:
        for field, value in Body(raw).grammars():
            done(look.at(field, memoryview(value)))
    except BadRequestError as error:
        return error.message
    return None


GIVEN: list[tuple[dict[str, Any], str]] = [
    (
        {"tools": [{"type": "function"}, {"type": "function", "function": {"parameters": schema(BOMB)}}]},
        "tools[1].function.parameters.properties.code.pattern",
    ),
    ({"tools": [{"name": "t", "input_schema": schema(BOMB)}]}, "tools[0].input_schema"),
    ({"response_format": {"json_schema": {"schema": schema(BOMB)}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "structural_tag", "format": {"type": "regex", "pattern": BOMB}}}, "format"),
    ({"structured_outputs": {"regex": BOMB}}, "structured_outputs.regex"),
    ({"structured_outputs": {"json": schema(BOMB)}}, "structured_outputs.json.properties"),
    ({"structured_outputs": {"json": json.dumps(schema(BOMB))}}, "structured_outputs.json.properties"),
    ({"structured_outputs": {"structural_tag": json.dumps({"pattern": BOMB})}}, "structural_tag.pattern"),
    ({"structured_outputs": {"grammar": 'root ::= ("a"{1,99}){1,99}'}}, "structured_outputs.grammar"),
    ({"text": {"format": {"type": "json_schema", "schema": schema(BOMB)}}}, "text.format.schema"),
    ({"output_config": {"format": {"schema": schema(BOMB)}}}, "output_config.format.schema"),
    ({"response_format": {"schema": {"patternProperties": {BOMB: {}}}}}, "patternProperties"),
    ({"response_format": {"schema": {"propertyNames": {"pattern": BOMB}}}}, "propertyNames.pattern"),
    ({"response_format": {"schema": {"$defs": {"a": {"anyOf": [schema(BOMB)]}}}}}, "anyOf[0]"),
]


@pytest.mark.parametrize(("body", "where"), GIVEN)
def test_it_is_found_wherever_an_engine_would(body: dict[str, Any], where: str) -> None:
    said = refused(body)
    assert said is not None
    assert where in said
    assert "gateway.max_pattern_size" in said


def test_spelling_hides_nothing() -> None:
    raw = json.dumps({"structured_outputs": {"regex": BOMB}})
    for old, new in (
        ("{1", r"\u007b1"),
        ("regex", r"re\u0067ex"),
        ("9", r"\u0039"),
        ('s":', r'\u0073":'),
    ):
        spelled = raw.replace(old, new)
        assert json.loads(spelled) == json.loads(raw)
        assert refused(spelled.encode()) is not None, spelled
    odd = rb', "max_tokens": NaN, "x": "\ud800", "structured_outputs": {"n": NaN, "regex": "a{9999}"}}'
    assert refused(b'{"structured_outputs": {}' + odd) is not None


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": BOMB}]},
        {"messages": MESSAGES, "metadata": {"pattern": BOMB}},
        {"tools": [{"function": {"description": f"matches {BOMB}", "parameters": schema("^[a-z]{1,64}$")}}]},
        {"response_format": {"json_schema": {"schema": {"properties": {"pattern": {"enum": [BOMB]}}}}}},
        {"structured_outputs": {"choice": [BOMB]}},
        {"structured_outputs": {"json": "{no JSON {9}"}},
        {"structured_outputs": {"regex": "a{1000}"}},
        {"tools": None, "text": BOMB, "response_format": 7},
        {"tools": [{"function": {"parameters": {"pattern": 9, "regex": ["a{9999}"]}}}]},
    ],
)
def test_what_is_no_pattern_or_not_too_large_is_the_engines(body: dict[str, Any]) -> None:
    assert refused(body) is None


def test_many_that_are_small_are_one_that_is_large() -> None:
    tools = [{"function": {"parameters": schema("[a-z]{1,64}")}} for _ in range(70)]
    assert refused({"tools": tools[:60]}) is None
    said = refused({"tools": tools})
    assert said is not None
    assert "all of a request so far 4,032" in said
    assert refused({"tools": tools[:31], "structured_outputs": {"regex": "a{1000}"}}) is None
    assert refused({"tools": tools[:60], "structured_outputs": {"regex": "a{1000}"}}) is not None


def array(**counts: float) -> dict[str, Any]:
    return {"structured_outputs": {"json": {"type": "array", "items": {"type": "string"}, **counts}}}


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (array(maxItems=10**9), "structured_outputs.json.maxItems: is 1000000000, and all of a request"),
        (array(minItems=30_000, maxItems=30_000), "together 60,000"),
        (array(maxItems=1e300), "gateway.max_schema_count"),
        ({"tools": [array(maxItems=30_000), array(maxItems=30_000)]}, "maxItems"),
        ({"text": {"multipleOf": 1_000_003}}, "text.multipleOf: is 1000003"),
        ({"text": {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}}, "least common multiple"),
    ],
)
def test_numbers_that_an_engine_writes_out_are_bounded(body: dict[str, Any], where: str) -> None:
    said = refused(body)
    assert said is not None
    assert where in said


def test_numbers_that_it_does_not_write_out_are_not() -> None:
    steps = [{"multipleOf": number} for number in (0.01, 100, 1e6, 12, 10**9, -5, 0)]
    lengths = {"minLength": 10**9, "maxLength": 10**12, "maxProperties": 10**9, "maximum": 10**300}
    assert refused({"text": {"anyOf": steps, **lengths}, **array(minItems=1, maxItems=10_000)}) is None
    assert refused(array(minItems=-(10**400), maxItems=float("-inf"))) is None
    assert (
        refused({"tools": [{"properties": {"maxItems": {"type": "integer"}, "multipleOf": [10**9]}}]}) is None
    )


def test_a_pattern_that_is_long_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "expanded", None)
    assert refused({"structured_outputs": {"regex": "ab{2}" * 1000}}) is not None


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40))
def test_no_bytes_break_it(noise: bytes) -> None:
    text = json.dumps(noise.decode("latin-1"))
    refused(f'{{"tools": {text}, "structured_outputs": {{"json": {text}, "regex": {text}}}}}'.encode())


async def test_a_large_one_is_looked_at_in_turns_and_no_further_than_a_megabyte() -> None:
    reader, look = LargeReader(), Look(BOUNDS)
    for size, fix in ((200_000, "gateway.max_pattern_size"), (2 << 20, "send a smaller one")):
        padded = {"structured_outputs": {"json": schema(BOMB) | {"description": "x" * size}}}
        body = await reader.read(json.dumps(padded).encode(), "", 1 << 24, Reads.OPTIONS)
        ((field, raw),) = body.grammars()
        with pytest.raises(BadRequestError, match=fix):
            await reader.in_turns(look.at(field, memoryview(raw)))


ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": MESSAGES, "tools": [{"function": {"parameters": schema(BOMB)}}]}),
    ("/v1/completions", {"prompt": "hi", "structured_outputs": {"regex": BOMB}}),
    ("/v1/responses", {"input": "hi", "text": {"format": {"schema": schema(BOMB)}}}),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 5, "tools": [{"input_schema": schema(BOMB)}]}),
    ("/v1/chat/completions/batch", {"messages": [MESSAGES], "response_format": {"schema": schema(BOMB)}}),
]


async def test_no_engine_sees_one_at_any_endpoint() -> None:
    async with running_gateway(gateway={"max_pattern_size": 1000}) as stack:
        for path, body in ASKED:
            async with stack.http.post(stack.url + path, json={"model": "assistant", **body}) as response:
                said = (await response.json())["error"]
                assert response.status == 400, path
                assert "'^(a{1,9999}){1,9999}$' has 99,980,001 letters" in said["message"]
        assert _asked(stack) == 0
        fine = {"messages": MESSAGES, "tools": [{"function": {"parameters": schema("^[a-z]{1,64}$")}}]}
        async with stack.http.post(stack.url + ASKED[0][0], json={"model": "assistant", **fine}) as response:
            assert response.status == 200
        assert _asked(stack) == 1
        bomb = {"model": "assistant", **ASKED[0][1]}
        for body, status in (({"model": "assistant", **fine}, 200), (bomb, 400)):
            async with stack.http.post(stack.url + ASKED[0][0], json=body) as response:
                assert response.status == status, "what was fine once is known"
        assert _asked(stack) == 2


def _asked(stack: Stack) -> int:
    return sum(len(engine.requests) for engine in stack.engines.values())
