"""The gateway and the engine read the same request out of the same bytes, and ours is what counts."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from gateway.errors import BadRequestError
from gateway.proxy.body import LARGEST_READ_BYTES, Body, Reads
from gateway.proxy.endpoints import KNOWN_PATHS, endpoint_of
from gateway.proxy.fields import PROMPT_FIELDS, RequestFields

OURS = {"cache_salt": b'"ours"', "priority": b"0", "model": b'"assistant"'}

names = st.sampled_from(["model", "stream", "cache_salt", "priority", "user", "n", "x", "messages"])
texts = st.text(max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | names, inner, max_size=3)
)


def spelled(name: str, escaped: set[int]) -> str:
    """A name as JSON, some of its letters written as escapes."""
    letters = [f"\\u{ord(c):04X}" if i in escaped and c.isascii() else c for i, c in enumerate(name)]
    return '"' + "".join(letters) + '"'


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Objects whose names come twice, in several spellings, with any white space, in any of the encodings
    that ``json.loads`` takes."""
    space = draw(st.sampled_from(["", " ", "\n\t", "\r\n  "]))
    pairs = []
    for name, value in draw(st.lists(st.tuples(names, values), max_size=6)):
        escaped = draw(st.sets(st.integers(0, 9), max_size=3))
        ascii_only = draw(st.booleans())
        pairs.append(f"{spelled(name, escaped)}{space}:{space}{json.dumps(value, ensure_ascii=ascii_only)}")
    text = f"{space}{{{space}{(space + ',').join(pairs)}{space}}}{space}"
    coding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le"]))
    return text.encode(coding, "surrogatepass")


def same(left: Any, right: Any) -> bool:
    """Equal, NaN too."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


@given(bodies())
def test_ours_is_what_the_engine_reads_whatever_the_client_wrote(raw: bytes) -> None:
    expected = {**json.loads(raw), **{name: json.loads(value) for name, value in OURS.items()}}
    try:
        body = Body(raw)
    except BadRequestError:
        return  # a field that we need is wrong: nobody gets it
    assert same(json.loads(body.with_(OURS)), expected)
    assert same(json.loads(body.with_({})), json.loads(raw))


def read_by_vllm(sent: dict[str, Any]) -> tuple[Any, Any] | None:
    """Model and stream, as vLLM's own types take them; None where it refuses."""
    try:
        stream = TypeAdapter(bool | None).validate_python(sent.get("stream"))
        return TypeAdapter(str | None).validate_python(sent.get("model")), stream
    except ValidationError:
        return None


@given(bodies())
def test_gateway_and_engine_read_the_same(raw: bytes) -> None:
    sent = json.loads(raw)
    theirs = read_by_vllm(sent)
    try:
        body = Body(raw)
    except BadRequestError:
        assert theirs is None
        return
    if theirs is not None:
        assert (body.fields.model, body.fields.stream) == (theirs[0] or "", theirs[1])
    assert ("cache_salt" in sent) == ("cache_salt" in body)
    assert set(body) == set(sent)
    for name in sent:
        assert same(body.get(name), sent[name])
        assert same(json.loads(body.raw(name)), sent[name])


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (b"true", True), (b"1", True), (b"1.0", True), (b'"yes"', True), (b'"ON"', True), (b'"1"', True),
        (b"false", False), (b"0", False), (b'"false"', False), (b'"off"', False), (b"null", None),
    ],
)  # fmt: skip
def test_booleans_are_read_as_pydantic_reads_them(given: bytes, read: bool | None) -> None:
    assert Body(b'{"stream": %b}' % given).fields.stream is read


@pytest.mark.parametrize("given", [b"2", b'"maybe"', b'""', b"[]", b"{}", b"0.5", b"NaN", b'"\\ud800"'])
def test_what_is_no_boolean_is_refused_only_where_it_matters(given: bytes) -> None:
    raw = b'{"stream": %b}' % given
    with pytest.raises(BadRequestError, match=r"^stream: is an? .*; send true or false$"):
        Body(raw)
    assert Body(raw, Reads.NAMES).fields.stream is None, "an endpoint that never streams ignores it"


def test_the_last_of_several_counts_in_every_spelling() -> None:
    fields = Body(b'{"stream": "x", "stre\\u0061m": true, "model": "a", "mod\\u0065l": "b"}').fields
    assert (fields.stream, fields.model) == (True, "b")
    sent = b'{"cache_salt": "a", "cache_sal\\u0074": "theirs", "Cache_Salt": "b"}'
    assert json.loads(Body(sent).with_(OURS))["cache_salt"] == "ours"


def test_an_empty_object_can_be_added_to() -> None:
    for raw in (b"{}", b" { } \r\n", b"\xef\xbb\xbf{}"):
        assert json.loads(Body(raw).with_({"model": b'"a"'})) == {"model": "a"}


def test_the_model_may_be_left_out() -> None:
    for raw in (b"{}", b'{"model": null}', b'{"model": ""}'):
        assert Body(raw).fields.model == ""
    with pytest.raises(
        BadRequestError, match=r"model: is a number \(3\); send a model id as a string, or leav"
    ):
        Body(b'{"model": 3}')


def test_what_is_not_rfc_8259_is_read_as_python_reads_it() -> None:
    body = Body(b'{"temperature": NaN, "top_p": -Infinity, "user": "\\ud800", "a": 1, "a": 2}')
    assert math.isnan(body.get("temperature"))
    assert body.fields.user == "?", "no log line could hold a lone surrogate"
    assert json.loads(body.with_(OURS))["user"] == "\ud800", "the engine gets what was sent"
    assert body.raw("a") == b"2"
    assert Body(b'{"temperature": 1e400}').get("temperature") == math.inf
    assert Body('{"model": "ä"}'.encode("utf-16")).fields.model == "ä"


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b'{"x": "\xff"}', "not valid JSON"),
        (b'{"x": "\x01"}', "not valid JSON"),
        (b'{"x": 1}}', "not valid JSON"),
        (b"\xef\xbb\xbf[]", "is an array"),
        (b'{"x": NaN, "y": %b}' % (b"1" * 5000), "not valid JSON"),
        (b'{"x": NaN, "y": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
    ],
)
def test_what_nobody_can_read_is_refused(raw: bytes, says: str) -> None:
    with pytest.raises(BadRequestError, match=says):
        Body(raw)


def test_numbers_of_any_length_pass_unread() -> None:
    raw = b'{"seed": %b, "temperature": 1e400, "stream": true}' % (b"1" * 5000)
    assert Body(raw).with_({}) == raw


def test_fields_of_a_megabyte_are_not_read() -> None:
    large = json.dumps({"agent_role": "core", "x": "y" * LARGEST_READ_BYTES}).encode()
    assert Body(b'{"metadata": %b}' % large).fields.metadata is None
    assert Body(b'{"metadata": %b, "stream": "no"}' % large).fields.metadata is None
    small = Body(b'{"metadata": {"agent_role": "core"}, "vllm_xargs": {"a": 1}}').fields
    assert (small.metadata, small.vllm_xargs) == ({"agent_role": "core"}, {"a": 1})


@pytest.mark.parametrize(
    ("asked", "takes"),
    [
        ({}, True),
        ({"logprobs": None, "top_logprobs": None}, True),
        ({"logprobs": False, "top_logprobs": 0}, True),
        ({"logprobs": True, "top_logprobs": 3}, True),
        ({"logprobs": True, "top_logprobs": -1}, True),
        ({"logprobs": "true", "top_logprobs": 3.0}, True),
        ({"top_logprobs": 3}, False),
        ({"logprobs": False, "top_logprobs": 3}, False),
        ({"logprobs": "false", "top_logprobs": 3}, False),
        ({"logprobs": True, "top_logprobs": -2}, False),
        ({"logprobs": True, "top_logprobs": "3"}, False),
        ({"logprobs": "perhaps"}, False),
        ({"logprobs": 3}, False),
        ({"logprobs": True, "logprob_token_ids": [5]}, False),
        ({"echo": True}, False),
        ({"echo": "yes"}, False),
        ({"echo": False}, True),
    ],
)
def test_log_probabilities_are_added_only_where_that_changes_nothing(
    asked: dict[str, Any], takes: bool
) -> None:
    assert Body(json.dumps(asked).encode()).fields.takes_logprobs is takes


def test_stream_options_are_read_only_for_streams() -> None:
    for raw in (b'{"stream_options": 3}', b'{"stream": 0, "stream_options": []}'):
        assert Body(raw).fields == RequestFields(stream=Body(raw).fields.stream)
    read = Body(b'{"stream": "on", "stream_options": {"include_usage": "1", "x": 2}}').fields.stream_options
    assert read == {"include_usage": True, "x": 2}
    with pytest.raises(BadRequestError, match=r"stream_options.include_usage: is a string \(\"perhaps\"\)"):
        Body(b'{"stream": true, "stream_options": {"include_usage": "perhaps"}}')
    assert Body(b'{"stream": true, "stream_options": 3}', Reads.STREAM).fields.stream is True


def test_a_prompt_never_becomes_an_object() -> None:
    """What is decoded is what was asked for: the prompt's bytes stay the client's."""
    raw = b'{"model": "assistant", "messages": [{"role": "user", "content": "%b"}]}' % (b"x" * 16384)
    body = Body(raw)
    assert body.with_({"model": b'"other"'}).startswith(raw[:-1])
    assert body.with_({}) is raw


def test_a_field_that_must_be_read_is_refused_when_it_is_large() -> None:
    large = b"[%b1]" % (b"[]," * LARGEST_READ_BYTES)
    for raw, says in (
        (b'{"stream": %b}' % large, "stream: has "),
        (b'{"model": %b}' % large, "model: has "),
        (b'{"stream": true, "stream_options": {"x": %b}}' % large, "stream_options: has "),
    ):
        with pytest.raises(BadRequestError, match=says):
            Body(raw)
    assert Body(b'{"stream": 0, "messages": %b}' % large).raw("messages") == large


def test_fields_that_nobody_asks_for_are_skipped_however_many_there_are() -> None:
    body = Body(b"{%b}" % b",".join(b'"%d":1' % number for number in range(1000)))
    assert "messages" not in body
    assert body.get("stream") is None
    assert body._all is None
    assert len(body.everything()) == 1000


def test_the_prompts_of_all_endpoints_are_known_fields() -> None:
    endpoints = [endpoint for path in KNOWN_PATHS if (endpoint := endpoint_of(path)) is not None]
    assert {name for endpoint in endpoints for name in endpoint.prompt} <= set(PROMPT_FIELDS)
