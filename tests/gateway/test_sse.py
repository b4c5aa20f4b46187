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


@pytest.mark.parametrize("garbage", [b"<html>\n\n", b"data: {\n\n", b"data: 5\n\n", b"\x00\xff\n\n"])
def test_garbage_is_an_upstream_error(garbage: bytes) -> None:
    with pytest.raises(UpstreamError, match="no answer"):
        EventSplitter().feed(garbage)
