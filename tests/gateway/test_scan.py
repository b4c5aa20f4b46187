"""Where fields stand in a large object: as every parser of JSON sees them, wherever a step ends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.proxy import scan
from gateway.proxy.scan import (
    MOST_DEPTH,
    MOST_FIELDS,
    Found,
    NotJsonError,
    Steps,
    T,
    TooDeepError,
    TooManyFieldsError,
    count_items,
    first_level,
)


@pytest.fixture(params=[8, 64, 32 << 10])
def window(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Steps end within strings, escapes and brackets as well."""
    monkeypatch.setattr(scan, "WINDOW", request.param)
    return int(request.param)


def done(steps: Steps[T]) -> tuple[T, int]:
    """What comes of it, and after how many steps."""
    count = 0
    while True:
        count += 1
        try:
            next(steps)
        except StopIteration as end:
            return end.value, count


def fields_of(raw: bytes, found: Found) -> dict[str, Any]:
    return {name: json.loads(raw[begin:end]) for name, (begin, end) in found.fields.items()}


TEXTS = st.text(st.sampled_from('ab"\\/{}[]:, \n\té漢𝄞\ud800'), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)
SPACES = st.text(st.sampled_from(" \t\r\n"), max_size=3)


@given(st.dictionaries(TEXTS, VALUES, max_size=6), st.booleans(), SPACES, st.sampled_from([8, 21, 32 << 10]))
def test_fields_are_those_that_a_parser_finds(
    asked: dict[str, Any], escaped: bool, space: str, size: int
) -> None:
    text = json.dumps(asked, ensure_ascii=escaped, separators=(f"{space},{space}", f"{space}:{space}"))
    raw = f"{space}{text}{space}".encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "WINDOW", size)
        found, _ = done(first_level(raw))
    assert fields_of(raw, found) == json.loads(raw)
    assert raw[found.close :].strip() == b"}"


@given(st.binary(max_size=40) | st.text(st.sampled_from('{}[]":,\\ 1a'), max_size=40).map(str.encode))
def test_what_a_parser_takes_is_taken_and_seen_alike(noise: bytes) -> None:
    """And whatever else comes raises nothing but that it is no JSON."""
    for raw in (noise, b'{"a":%b}' % noise, b'{"a":"%b"}' % noise, b'{"a":[%b],"b":1}' % noise):
        try:
            expected = json.loads(raw)
        except (ValueError, RecursionError):
            expected = None
        try:
            found, _ = done(first_level(raw))
        except NotJsonError:
            assert not isinstance(expected, dict) or json.detect_encoding(raw) != "utf-8"
        else:
            if isinstance(expected, dict):
                assert fields_of(raw, found) == expected


def test_the_last_of_several_counts_in_every_spelling(window: int) -> None:
    raw = rb'{"model": 1, "mod\u0065l": "a\"b", "x": {}}'
    found, _ = done(first_level(raw))
    assert fields_of(raw, found) == {"model": 'a"b', "x": {}}


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b" ", b"[]", b'"a"', b"{", b'{"a"', b'{"a":', b'{"a":1', b'{"a":1,}', b'{"a":1}}', b'{"a" 1}'),
        *(b"{,}", b'{"a":}', b'{"a":1 "b":2}', b'{"a":"', b'{"a":"\\"}', b'{"a":[1,{"b":"]"}}', b'{"a":[}'),
        *(b"{a:1}", b'{"a":1} x', b'{"\\x":1}', b'{"a":[' + b'"\\', b'{"a":[]' + b" " * 100),
    ],
)
def test_what_is_cut_off_or_no_object_is_refused(raw: bytes, window: int) -> None:
    with pytest.raises(NotJsonError):
        done(first_level(raw))


def test_a_step_looks_at_no_more_than_a_window() -> None:
    """Whatever a megabyte is made of, there are as many steps as windows at least."""
    size = 1 << 20
    for inner in (
        b'"%b"' % (b"a" * size),
        b'"%b"' % (b'\\"' * (size // 2)),
        b"[%b1]" % (b'{"a":"b"},' * (size // 10)),
        b"[%b1]" % (b"[[[]]]," * (size // 7)),
        b"1" * size,
        b"%b1" % (b" " * size),
    ):
        raw = b'{"a":%b}' % inner
        found, steps = done(first_level(raw))
        begin, end = found.fields["a"]
        assert (raw[begin:end], found.close) == (inner.strip(), len(raw) - 1)
        assert steps >= size // scan.WINDOW


def test_depth_and_fields_are_bounded() -> None:
    deep = b'{"a":%b%b}'
    done(first_level(deep % (b"[" * MOST_DEPTH, b"]" * MOST_DEPTH)))
    with pytest.raises(TooDeepError):
        done(first_level(deep % (b"[" * 100_000, b"]" * 100_000)))
    fields = [b'"%d":1' % number for number in range(MOST_FIELDS + 1)]
    done(first_level(b"{%b}" % b",".join(fields[1:])))
    with pytest.raises(TooManyFieldsError):
        done(first_level(b"{%b}" % b",".join(fields)))


@pytest.mark.parametrize(
    ("array", "count"),
    [
        (b"[]", 0),
        (b"[ 1 ]", 1),
        (b'["a","b\\"," , []]', 3),
        (b'[[1,2],[3],{"a":[1,2]}]', 3),
        (b"[%b1]" % (b"1," * 500), 100),
    ],
)
def test_items_are_counted_up_to_a_limit(array: bytes, count: int, window: int) -> None:
    assert done(count_items(b"xx" + array, 2, 100))[0] == count
