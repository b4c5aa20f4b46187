"""Server-sent events, from bytes as they arrive (WHATWG HTML, section 9.2).

An event ends with a blank line; lines end with LF or CRLF (nobody writes CR alone). Only ``data`` is read;
comments, ``event``, ``id`` and ``retry`` are passed on, and other lines are ignored beside them. What has
none of these lines is no event of an engine: an error page, say.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.errors import UpstreamError

LONGEST_EVENT_BYTES = 16 << 20
_BLANK_LINE = re.compile(rb"\n\r?\n")
_LONGEST_BLANK_LINE = 3
_LINE_END = re.compile(rb"\r?\n")
_OTHER_FIELDS = (b":", b"event:", b"id:", b"retry:")
_EMPTY_FIELDS = (b"event", b"id", b"retry")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)
"""What decoders of JSON raise for what is no JSON (text that is no UTF-8 is a ValueError)."""
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

    __slots__ = ("_size", "pending")

    def __init__(self) -> None:
        self.pending: list[bytes] = []
        """Parts of an event that has not ended."""
        self._size = 0

    def split(self, data: bytes) -> list[bytes]:
        """The events that ``data`` completes, each with the blank line that ends it, as they came.
        Raises UpstreamError for one that grows above ``LONGEST_EVENT_BYTES``."""
        if not self.pending and data.endswith(b"\n\n"):
            if data.find(b"\n") == len(data) - 2:
                return [data]  # nearly always: one event of one line
            if b"\r" not in data and not data.endswith(b"\n\n\n"):
                return [event + b"\n\n" for event in data[:-2].split(b"\n\n")]
        # A blank line may have begun in what is here already; all before that has been searched.
        held = b"".join(self.pending[-_LONGEST_BLANK_LINE:])[1 - _LONGEST_BLANK_LINE :]
        if _BLANK_LINE.search(held + data) is None:
            self._keep(data)
            return []
        self.pending.append(data)
        stream = b"".join(self.pending)
        searched = len(stream) - len(data) - len(held)
        events, start = [], 0
        for blank in _BLANK_LINE.finditer(stream, searched):
            events.append(stream[start : blank.end()])
            start = blank.end()
        self.pending, self._size = [], 0
        if start < len(stream):
            self._keep(stream[start:])
        return events

    def feed(self, data: bytes) -> list[ServerEvent]:
        """The events that ``data`` completes, decoded. Raises UpstreamError for what is no such stream."""
        return [event_of(raw) for raw in self.split(data)]

    def _keep(self, data: bytes) -> None:
        if data:
            self.pending.append(data)
        self._size += len(data)
        if self._size > LONGEST_EVENT_BYTES:
            raise UpstreamError("The engine sent an event that never ends.")


def fields_of(raw: bytes) -> tuple[bytes, bytes]:
    """An event's data (empty where it has none: a comment) and its other lines, each ended with LF.
    Raises UpstreamError for what is no event."""
    if raw.startswith(b"data: ") and raw.find(b"\n") == len(raw) - 2:
        return raw[6:].strip(), b""  # nearly always: one line
    data, others, ignored = [], [], False
    for line in _LINE_END.split(raw.removeprefix(_BYTE_ORDER_MARK)):
        if line.startswith(b"data:"):
            data.append(line[5:].strip())
        elif line.startswith(_OTHER_FIELDS) or line in _EMPTY_FIELDS:
            others.append(line + b"\n")
        elif line == b"data":
            data.append(b"")
        elif line:
            ignored = True
    if ignored and not (data or others):
        raise garbage(raw)
    return b"\n".join(data), b"".join(others)


def object_of(payload: bytes) -> dict[str, Any]:
    """The JSON object of an event's data. Raises UpstreamError for anything else."""
    try:
        data = msgspec.json.decode(payload)
    except UNREADABLE:
        try:
            data = json.loads(payload)  # takes NaN as well, which some engines write
        except (ValueError, RecursionError):
            raise garbage(payload) from None
    if not isinstance(data, dict):
        raise garbage(payload)
    return data


def event_of(raw: bytes) -> ServerEvent:
    """An event, decoded. Raises UpstreamError."""
    payload, _ = fields_of(raw)
    if not payload:
        return ServerEvent(raw)
    if payload == b"[DONE]":
        return ServerEvent(raw, done=True)
    return ServerEvent(raw, object_of(payload))


def garbage(raw: bytes) -> UpstreamError:
    """The error for what is no answer. The log gets its size and nothing of it."""
    said = "The engine sent something that is no answer"
    return UpstreamError(f"{said}.", internal=f"{said}: {len(raw)} bytes")
