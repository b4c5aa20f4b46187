"""Engines cut their streams into TCP segments anywhere; events must come out whole and unchanged."""

from __future__ import annotations

import pytest

from gateway.errors import UpstreamError
from gateway.upstream.sse import EventSplitter, ServerEvent

STREAM = b': ping\n\ndata: {"a":1}\n\nevent: x\r\ndata: {"b":"\xc3\xa9"}\r\n\r\ndata:[DONE]\n\n'
EVENTS = [
    ServerEvent(b": ping\n\n"),
    ServerEvent(b'data: {"a":1}\n\n', {"a": 1}),
    ServerEvent(b'event: x\r\ndata: {"b":"\xc3\xa9"}\r\n\r\n', {"b": "é"}),
    ServerEvent(b"data:[DONE]\n\n", done=True),
]


@pytest.mark.parametrize("size", range(1, len(STREAM) + 1))
def test_any_cut_gives_the_same_events(size: int) -> None:
    splitter = EventSplitter()
    pieces = [STREAM[start : start + size] for start in range(0, len(STREAM), size)]
    assert [event for piece in pieces for event in splitter.feed(piece)] == EVENTS


@pytest.mark.parametrize(
    "line", [b"foo: bar", b"foo", b"x-y:", b"id", b"<p>", b"dataset: 5", b": c", b"event"]
)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_lines_of_other_names_are_ignored_beside_data(line: bytes, end: bytes) -> None:
    for lines in ((line, b'data: {"a":1}'), (b'data: {"a":1}', line), (b'data: {"a":', line, b"data:1}")):
        wire = end.join((*lines, b"", b""))
        assert EventSplitter().feed(wire) == [ServerEvent(wire, {"a": 1})]


@pytest.mark.parametrize("wire", [b"data\n\n", b"data:\n\n", b"id\n\n", b"event: x\nfoo\n\n"])
def test_an_event_without_data_is_none(wire: bytes) -> None:
    assert EventSplitter().feed(wire) == [ServerEvent(wire)]


@pytest.mark.parametrize(
    "garbage", [b"<html>\n\n", b"Error: gone\n\n", b"data: {\n\n", b"data: 5\n\n", b"\x00\xff\n\n"]
)
def test_garbage_is_an_upstream_error(garbage: bytes) -> None:
    with pytest.raises(UpstreamError, match="no answer"):
        EventSplitter().feed(garbage)
