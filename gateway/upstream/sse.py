"""Server-sent events, from bytes as they arrive (WHATWG HTML, section 9.2; the ``data`` field only)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from gateway.errors import UpstreamError

LONGEST_EVENT_BYTES = 16 << 20
_BLANK_LINE = re.compile(rb"\r?\n\r?\n")
_FIELDS = (b"data:", b":", b"event:", b"id:", b"retry:")
DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class ServerEvent:
    """One server-sent event, or the whole of an answer that is not streamed.

    ``data`` is None for what is no JSON: ``[DONE]`` (then ``done``) and comments.
    """

    raw: bytes
    data: dict[str, Any] | None = None
    done: bool = False


class EventSplitter:
    """Cuts a byte stream into events. Keeps only what belongs to the event that is still arriving."""

    __slots__ = ("rest",)

    def __init__(self) -> None:
        self.rest = b""

    def cut(self, data: bytes) -> bytes:
        """The whole events that ``data`` completes, as they came. Raises UpstreamError."""
        if self.rest:
            data = self.rest + data
        if data.endswith(b"\n\n"):
            self.rest = b""
            return data
        end = 0
        for blank in _BLANK_LINE.finditer(data):
            end = blank.end()
        self.rest = data[end:]
        if len(self.rest) > LONGEST_EVENT_BYTES:
            raise UpstreamError("The engine sent an event that never ends.")
        return data[:end]

    def feed(self, data: bytes) -> list[ServerEvent]:
        """The events that ``data`` completes. Raises UpstreamError for what is no such stream."""
        return events_of(self.cut(data))


def events_of(whole: bytes) -> list[ServerEvent]:
    """Events from bytes that end with the last one. Raises UpstreamError."""
    events, start = [], 0
    for blank in _BLANK_LINE.finditer(whole):
        events.append(_event(whole[start : blank.end()]))
        start = blank.end()
    return events


def _event(raw: bytes) -> ServerEvent:
    lines = [line for line in raw.splitlines() if line]
    if not all(line.startswith(_FIELDS) for line in lines):
        raise garbage(raw)
    values = [line[5:].strip() for line in lines if line.startswith(b"data:")]
    if not values:
        return ServerEvent(raw)
    text = b"\n".join(values)
    if text == b"[DONE]":
        return ServerEvent(raw, done=True)
    try:
        data = json.loads(text)
    except ValueError:
        raise garbage(raw) from None
    if not isinstance(data, dict):
        raise garbage(raw)
    return ServerEvent(raw, data)


def garbage(raw: bytes) -> UpstreamError:
    said = "The engine sent something that is no answer"
    return UpstreamError(f"{said}.", internal=f"{said}: {len(raw)} bytes")
