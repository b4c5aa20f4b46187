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
from gateway.proxy.grammars import Bounds, Look, expanded
from gateway.proxy.large import LargeReader
from gateway.proxy.productions import MOST, sizes

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
        ("a{" + " " * 99 + "7\t}", 7),
        ("a{ \n\u20031 ,\u00a0 7}", 7),
        ("(a{9}) {9}", 18),
        ("(?x)(a{9}) {9}", 83),
        ("(?ix: (a{9})#b\n{9})", 136),
    ],
)
def test_the_size_of_a_pattern_is_that_of_what_it_stands_for(pattern: str, size: int) -> None:
    assert done(expanded(pattern)) == size


@pytest.mark.parametrize(
    "grammar",
    [
        '("a"{99}) {99}',
        '("a" ~ 99)\t~\t99',
        '("a"{99}) # as often again\n {99}',
        '"a"{# so often\n 9801}',
        '"a"{0 # at least\n , 9801}',
        '"a"{0 # {\n , # }\n 9801 # at most\n }',
        '"a"{# { so often\n\n9801\n}',
    ],
)
def test_a_grammar_has_space_and_comments_wherever_an_engine_takes_them(grammar: str) -> None:
    assert done(sizes(f"root ::= {grammar}"))[0] > 9000
    assert refused({"structured_outputs": {"grammar": f"root ::= {grammar}"}}) is not None


@pytest.mark.parametrize("text", ["{", "[", "{ ", "\n", "{#", "{,", "~ ", "\n1", "(?x", "[\\", "{1 ", "\n "])
def test_no_pattern_is_read_again_and_again(text: str) -> None:
    """What takes more than time in proportion to this is not done in years."""
    for pattern in (text * 50_000, text + " " * 100_000):
        done(expanded(pattern))
        done(sizes(pattern))


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


SPACES = [
    "",
    " " * 9,
    r"\t",
    r"\n\r\f",
    r"\u0020\u0009",
    r"\u00a0",
    r"\u2003",
    "\u2003",
    " " * 40_000,
    r"\t" * 40_000,
]


@pytest.mark.parametrize("space", SPACES, ids=range(len(SPACES)))
def test_no_space_hides_a_count(space: str) -> None:
    for text in (
        '"regex": "a{%s99999}"',
        '"regex": "a{%s1%s,%s99999}"',
        '"regex": "a\\\\u007b%s99999}"',
        '"grammar": "start: a ~%s99999"',
        '"grammar": "root ::= a {%s#%s\\n%s99999}"',
        '"json": "{\\"pattern\\": \\"a{%s99999}\\"}"',
    ):
        inner = space.replace("\\", r"\\") if "json" in text else space
        spelled = '{"structured_outputs": {' + text.replace("\\\\u", "\\u").replace("%s", inner) + "}}"
        json.loads(spelled)
        assert refused(spelled.encode()) is not None, text
    if "\\" not in space and space.isascii():
        for name in ("maxItems", r"max\u0049tems", r"\u006daxItems", "multipleOf", r"multiple\u004ff"):
            spelled = f'{{"text": {{"{name}"{space}:{space}1000000007}}}}'
            assert refused(spelled.encode()) is not None, name


PIECES = st.sampled_from(
    [
        "{",
        "~",
        " ",
        "\n",
        r"\n",
        r"\t",
        "\\",
        r"\u00",
        r"\u2003",
        " " * 20,
        r"\n" * 10,
        "4",
        "é",
        "minItems",
        "multipleOf",
        '"',
        "#",
        "Items",
        ",",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=12), st.integers(1, 9))
def test_a_large_text_is_glanced_at_as_a_small_one(pieces: list[str], window: int) -> None:
    raw = "".join(pieces).encode()
    whole = done(grammars._counts(raw))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammars, "WINDOW", window)
        assert done(grammars._counts(raw)) == whole


@pytest.mark.parametrize(
    "text", [r"{\n  a", "é{é}", "~ x", '{"a":{"b":[{"c":1}]}}', r"{\"a\": {}}", "Line Items", "{a}1"]
)
def test_a_glance_is_enough_for_what_counts_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of such texts a field may have more than a megabyte."""
    raw = json.dumps({"description": text}, indent=3).encode()
    for window in (1, 2, 3, 7, 1000):
        monkeypatch.setattr(grammars, "WINDOW", window)
        assert not done(grammars._counts(raw))


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
        ({"structured_outputs": {"json": '{"maxItems" : 1000000000}'}}, "json.maxItems: is 1000000000"),
        ({"structured_outputs": {"json": r'{"max\u0049tems":1000000000}'}}, "json.maxItems: is 1000000000"),
        (
            {"structured_outputs": {"grammar": r'start: %json {"a":{"max\u0049tems": 1000000000}} "x"'}},
            "structured_outputs.grammar.a.maxItems: is 1000000000",
        ),
        (
            {
                "structured_outputs": {
                    "grammar": 'start: %json %jsonx{ %json\n[{"minItems":' + "9" * 900 + "}]"
                }
            },
            "structured_outputs.grammar[0].minItems",
        ),
        ({"tools": [array(maxItems=30_000), array(maxItems=30_000)]}, "maxItems"),
        ({"text": {"multipleOf": 1_000_003}}, "text.multipleOf: is 1000003"),
        ({"text": {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}}, "least common multiple"),
    ],
)
def test_numbers_that_an_engine_writes_out_are_bounded(body: dict[str, Any], where: str) -> None:
    said = refused(body)
    assert said is not None
    assert where in said


@pytest.mark.parametrize("more", ['"a":007', '"a":"\t"', '"a":+7', "", "'a':1", '"a":"\\q"', '"a":1e'])
def test_a_schema_in_a_grammar_that_only_some_engines_can_read_is_refused(more: str) -> None:
    """xgrammar reads the first one."""
    hidden = r'{"type":"string","pattern":"^(ab)\u007b2000}$",'
    said = refused({"structured_outputs": {"grammar": f"start: %json {hidden}{more}}}"}})
    assert said is not None
    assert "structured_outputs.grammar: has a %json" in said
    said = refused({"structured_outputs": {"grammar": f'start: %json\n\t{hidden}"a":7}}'}})
    assert said is not None
    assert "structured_outputs.grammar.pattern: '^(ab){2000}$' has 4,000 letters" in said
    fine = r'start: %json {"type":"string","pattern":"^(ab)\u007b20}$"} | "%json" # %json'
    assert refused({"structured_outputs": {"grammar": fine}}) is None


@pytest.mark.parametrize("name", ["whitespace_pattern", "item_separator", "key_separator"])
def test_what_guidance_puts_between_items_is_a_pattern(name: str) -> None:
    assert refused({"text": {"x-guidance": {name: "a{99999}"}}}) is not None
    assert refused({"text": {"x-guidance": {name: r"\s{1,9}"}, "properties": {name: {"maximum": 9}}}}) is None


@pytest.mark.parametrize("count", ["{,99999}", "{ , 99999}", "~ +99999", "~ 1..+99999", "{99999,}"])
def test_every_spelling_of_a_repetition_counts(count: str) -> None:
    assert refused({"structured_outputs": {"grammar": f'start: "ab"{count}'}}) is not None


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


@pytest.mark.parametrize("item", ["a", {}, 1])
def test_items_of_which_nothing_counts_are_passed_in_short_steps(item: Any) -> None:
    raw = json.dumps([{"maxItems": 1}, [item] * 100_000])
    steps = sum(1 for _ in Look(BOUNDS).at("tools", memoryview(raw.encode())))
    assert steps >= 100_000 / grammars._AT_ONCE


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
