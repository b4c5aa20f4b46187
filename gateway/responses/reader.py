"""What passes of a response that is kept: the object within it is set right, and the last one is kept.

An engine knows nothing of our store, so ``previous_response_id`` and ``store`` of its objects are ours to
say, in every event that has one.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from typing import Any, cast

import msgspec
from msgspec import Raw

from gateway.responses.conversation import is_id
from gateway.upstream.readers import Reader

FINAL = frozenset(("completed", "incomplete", "failed", "cancelled"))
_OBJECTS = frozenset(f"response.{status}" for status in ("created", "queued", "in_progress", *FINAL))
"""Types of events that have the response object."""
_HAS_OBJECT = re.compile(rb"response\.(?:created|queued|in_progress|completed|incomplete|failed|cancelled)")
_EVENTS = re.compile(rb"(?:[^\r\n]+\r?\n)+\r?\n|(?:\r?\n)+")
_OBJECT = msgspec.json.Decoder(dict[str, Raw])


class KeptReader:
    """Reads an answer with ``reader``, which gives whole events, and has ``objects`` set them right.
    Everything else is the reader's own."""

    def __init__(self, reader: Reader, objects: ResponseObjects, *, stream: bool) -> None:
        self._reader = reader
        self._set_right = objects.events if stream else objects.whole

    def feed(self, data: bytes, at: float) -> bytes:
        """What the client gets."""
        return self._set_right(self._reader.feed(data, at))

    def flush(self) -> bytes:
        """What came together with what broke the answer off."""
        return self._set_right(self._reader.flush())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


class _Event(msgspec.Struct):
    type: Any = None


class ResponseObjects:
    """Follows one response. ``keep`` gets its id, status and object once it is whole."""

    def __init__(
        self, shown: dict[str, bytes], keep: Callable[[str, str, bytes], None], own_id: str | None = None
    ) -> None:
        """``shown``: fields of the object that are ours, as JSON. ``own_id``: instead of the engine's."""
        self._shown = {name: Raw(value) for name, value in shown.items()}
        self._keep = keep
        self._id = own_id
        self.done = False

    def around(self, reader: Reader, *, stream: bool) -> Reader:
        """See ``gateway.proxy.exchange.Follower``."""
        return cast(Reader, KeptReader(reader, self, stream=stream))

    def whole(self, data: bytes) -> bytes:
        """An answer that is not streamed, as its client gets it."""
        return self._object(data, last=True)

    def events(self, whole: bytes) -> bytes:
        """Whole events, as their client gets them."""
        if not whole or _HAS_OBJECT.search(whole) is None:
            return whole
        return b"".join([self._event(event) for event in _EVENTS.findall(whole)])

    def _event(self, event: bytes) -> bytes:
        if _HAS_OBJECT.search(event) is None:
            return event
        lines = event.splitlines()
        data = b"\n".join([line[5:].strip() for line in lines if line.startswith(b"data:")])
        try:
            fields = _OBJECT.decode(data)
            kind = msgspec.json.decode(data, type=_Event).type
        except (msgspec.MsgspecError, RecursionError):
            return event
        if kind not in _OBJECTS or "response" not in fields:
            return event
        last = kind.removeprefix("response.") in FINAL
        fields["response"] = Raw(self._object(bytes(fields["response"]), last=last))
        rest = [line + b"\n" for line in lines if line and not line.startswith(b"data:")]
        return b"%bdata: %b\n\n" % (b"".join(rest), msgspec.json.encode(fields))

    def _object(self, data: bytes, *, last: bool) -> bytes:
        try:
            fields = _OBJECT.decode(data)
        except (msgspec.MsgspecError, RecursionError):
            return data  # whoever reads it next says what it is
        name, status = _text(fields.get("id")), _text(fields.get("status"))
        if _text(fields.get("object")) != "response" or name is None or status is None:
            return data
        if self._id is None:
            # vLLM takes ids of a client's making, whatever they are.
            self._id = name if is_id(name) else f"resp_{secrets.token_hex(16)}"
        fields.update(self._shown)
        fields["id"] = Raw(msgspec.json.encode(self._id))
        changed = msgspec.json.encode(fields)
        if last and not self.done:
            self.done = True
            # Nothing more comes of it, whatever an engine calls that.
            self._keep(self._id, status if status in FINAL else "incomplete", changed)
        return changed


def _text(raw: Raw | None) -> str | None:
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw, type=str)
    except msgspec.MsgspecError:
        return None
