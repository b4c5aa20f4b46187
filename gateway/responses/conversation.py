"""From a response that was kept to what an engine is sent, and from items to what a client is shown.

Engines keep nothing for us: they get the whole conversation as ``input``, and no ``previous_response_id``.
Instructions are of one request and are not carried over, as at OpenAI. Of what an engine has said, messages,
reasoning, and calls of a client's own tools go back to it; calls of tools that it ran itself do not, since
vLLM takes no such items as input, and neither do log-probabilities.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType
from pydantic import TypeAdapter, ValidationError

from gateway.errors import BadRequestError
from gateway.proxy.scan import NotJsonError, TooDeepError, count_items
from gateway.responses.store import Stored

RETURNED = frozenset(("message", "reasoning", "function_call", "custom_tool_call"))
"""Types of output items that an engine takes back as input."""
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}
_NULL = Raw(b"null")
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_OBJECT = msgspec.json.Decoder(dict[str, Raw])
_ITEMS = msgspec.json.Decoder(list[Raw])
_FLAG = TypeAdapter(bool | None)
_ECHOED = (
    *("instructions", "metadata", "max_output_tokens", "max_tool_calls", "parallel_tool_calls", "reasoning"),
    *("temperature", "text", "tool_choice", "tools", "top_p", "truncation", "user", "service_tier"),
)
"""Fields of a request that its response shows as well."""
LARGEST_ECHOED_BYTES = 128 << 10
"""Of all of these together, where it is we who show them: they are made objects of, at once."""
LARGEST_DECODED_BYTES = 64 << 10
"""Of an item that is shown. A larger one is shown as it is, and no objects are made of it."""
_DEFAULTS = {
    "parallel_tool_calls": True,
    "temperature": 1.0,
    "top_p": 1.0,
    "tool_choice": "auto",
    "tools": [],
    "truncation": "disabled",
    "service_tier": "auto",
    "metadata": {},
}


class Asked(msgspec.Struct):
    """What a request to ``/v1/responses`` says of being kept and of going on."""

    previous_response_id: Any = None
    store: Any = None
    background: Any = None
    stream: Any = None
    conversation: Any = None
    previous_input_messages: Any = None


@dataclass(frozen=True, slots=True)
class Previous:
    """What a request goes on from, and the ``input`` that this makes for its engine."""

    id: str
    depth: int
    context: int
    """Bytes of the conversation so far."""
    input: bytes


def read(raw: bytes) -> Asked | None:
    """None for what is no JSON object, as RFC 8259 has it."""
    try:
        fields = _ASKED.decode(raw)
        given = {name: value for name in ASKED if (value := getattr(fields, name)) is not UNSET}
        small = {name: _LARGE if len(value) > 1024 else _decoded(value) for name, value in given.items()}
    except (msgspec.MsgspecError, RecursionError):
        return None
    return Asked(**small)


def _decoded(value: Raw) -> Any:
    return msgspec.json.decode(value)


_ASKED: msgspec.json.Decoder[Any] = msgspec.json.Decoder(
    msgspec.defstruct(
        "_Asked", [(name, Raw | UnsetType, UNSET) for name in Asked.__struct_fields__], gc=False
    )
)
"""The same, not looked into. Whatever else a request has is skipped, however many fields that are."""
ASKED = Asked.__struct_fields__
_LARGE = ("…",)
"""Stands for a value that is none of those that mean something."""
MOST_ITEMS = 1 << 17
"""Of what is given with one request that is kept: each has to be told from the others again."""


def flag(value: Any, field: str) -> bool | None:
    """A boolean as vLLM reads it. Raises BadRequestError."""
    if value is None or isinstance(value, bool):
        return value
    try:
        return _FLAG.validate_python(value)
    except ValidationError:
        raise BadRequestError(f"{field}: is no boolean; send true or false", param=field) from None


def is_id(value: Any) -> bool:
    """Whether it can be the id of a response: what is not, no store is asked for."""
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def own_input(raw: bytes) -> bytes:
    """A request's ``input`` as an array of items; empty for what is neither a string nor a list, which the
    engine refuses."""
    text = raw.strip()
    if text.startswith(b'"'):
        return b'[{"type":"message","role":"user","content":%b}]' % text
    return text if text.startswith(b"[") else b"[]"


def conversation(chain: Sequence[Stored], new: bytes) -> bytes:
    """The ``input`` for an engine: all turns of ``chain``, and then the array of new items."""
    parts: list[bytes] = []
    for stored in chain:
        parts.append(_within(stored.input))
        parts += [bytes(_taken_back(item)) for item in outputs(stored.response) if _type(item) in RETURNED]
    parts.append(_within(new))
    return b"[%b]" % b",".join([part for part in parts if part])


def has_too_many_items(array: bytes) -> bool:
    """Whether a request's ``input`` has more items than are kept. Takes long where it is large, but lets
    others go on: it is a thread's."""
    if len(array) <= MOST_ITEMS:
        return False
    steps = count_items(array, 0, MOST_ITEMS + 1)
    try:
        while True:
            next(steps)
    except StopIteration as end:
        return bool(end.value > MOST_ITEMS)
    except (NotJsonError, TooDeepError):
        return False  # nothing that could be read again


def _within(array: bytes) -> bytes:
    return array[1:-1].strip()


def outputs(response: bytes) -> list[Raw]:
    """The output items of a response object."""
    try:
        return _items(_OBJECT.decode(response).get("output", Raw(b"[]")))
    except msgspec.MsgspecError:
        return []


def _items(array: bytes | Raw) -> list[Raw]:
    try:
        return _ITEMS.decode(array)
    except (msgspec.MsgspecError, RecursionError):
        return []


def with_fields(raw: bytes, changes: Mapping[str, bytes]) -> bytes:
    """A JSON object with some of its fields set anew; ``changes`` are JSON."""
    fields = _OBJECT.decode(raw)
    fields.update({name: Raw(value) for name, value in changes.items()})
    return msgspec.json.encode(fields)


def unfinished(
    response_id: str,
    status: str,
    created: int,
    asked: Callable[[str], memoryview],
    model: str,
    previous: str | None,
) -> bytes:
    """The response object of a request in the background that no engine has answered. ``asked``: the JSON of
    its fields, empty for those that it does not have. What is large is left for the engine to show."""
    shown: dict[str, Raw] = {}
    left = LARGEST_ECHOED_BYTES
    for name in _ECHOED:
        view = asked(name)
        if len(view) > left or (raw := bytes(view)) in (b"", b"null"):
            continue
        left -= len(raw)
        if _is_plain(raw):
            shown[name] = Raw(raw)
    return msgspec.json.encode(
        {
            "id": response_id,
            "object": "response",
            "created_at": created,
            "status": status,
            "background": True,
            "error": None,
            "incomplete_details": None,
            "model": model or None,
            "output": [],
            "previous_response_id": previous,
            "store": True,
            "usage": None,
            **dict.fromkeys(_ECHOED),
            **_DEFAULTS,
            **shown,
        }
    )


def _is_plain(raw: bytes) -> bool:
    """Whether every reader of JSON takes it: no numbers beyond a float, no half characters."""
    try:
        msgspec.json.decode(raw)
    except (msgspec.MsgspecError, RecursionError):
        return False
    return True


def with_status(response: bytes, status: str, error: Mapping[str, str] | None = None) -> bytes:
    """The same response, which came to nothing."""
    return with_fields(response, {"status": msgspec.json.encode(status), "error": msgspec.json.encode(error)})


class ItemPage:
    """A page of a response's input, as OpenAI shows it: what its engine was given, each item with an id. Only
    what is shown, or may be the item that is asked after, is looked into."""

    def __init__(
        self, response_id: str, limit: int, after: str | None = None, *, newest_first: bool = False
    ) -> None:
        """``after``: the id of the item that comes before the page."""
        self.newest_first = newest_first
        self.ids: list[str] = []
        self.items: list[Raw] = []
        self.has_more = False
        self.begun = after is None
        """Whether the item before it has been found."""
        self._response_id = response_id
        self._limit = limit
        self._after, self._after_bytes = after or "", (after or "").encode(errors="replace")

    def take(self, some: Sequence[Stored]) -> bool:
        """The next responses of the conversation, in its order also where the page goes against that; whether
        no more are needed."""
        step = -1 if self.newest_first else 1
        for stored in some[::step]:
            for raw, name in self._items_of(stored)[::step]:
                if not self.begun:
                    self.begun = self._is_after(raw, name)
                elif len(self.items) == self._limit:
                    self.has_more = True
                    return True
                else:
                    shown = _Shown(raw, name)
                    self.ids.append(shown.id)
                    self.items.append(shown.json())
        return False

    def _items_of(self, stored: Stored) -> list[tuple[Raw, str]]:
        """A response's items, and what those are named by that have no id."""
        name = stored.id.removeprefix("resp_")
        items = [(item, f"{name}_{i}") for i, item in enumerate(_items(stored.input))]
        if stored.id != self._response_id:
            items += [(item, f"{name}_o{i}") for i, item in enumerate(outputs(stored.response))]
        return items

    def _is_after(self, raw: Raw, name: str) -> bool:
        said = bytes(raw)
        may_be = self._after.endswith(name) or self._after_bytes in said or b"\\" in said
        return may_be and _Shown(raw, name).id == self._after


class _Shown:
    """An item as it is shown, under ``id``."""

    def __init__(self, raw: Raw, name: str) -> None:
        self._whole: Raw | None = None
        """Of a large one: it is shown as it came, and what is ours behind it."""
        if len(memoryview(raw)) <= LARGEST_DECODED_BYTES:
            item = _decoded_item(raw)
        elif (glimpsed := _glimpsed_item(raw)) is not None:
            self._whole, item = raw, glimpsed
        else:
            item = {"type": "unknown", "value": raw}
        self._item = item
        kind = item.get("type") or "message"
        self._kind = kind if isinstance(kind, str) else "unknown"
        given = item.get("id")
        if given is None:
            given = f"{_PREFIXES.get(self._kind, 'item')}_{name}"
        self.id = given if isinstance(given, str) else f"item_{name}"

    def json(self) -> Raw:
        item, kind = self._item, self._kind
        ours: dict[str, Any] = {"id": self.id, "type": kind}
        if kind in ("message", "function_call", "function_call_output") and item.get("status") is None:
            ours["status"] = "completed"
        if kind == "message" and isinstance(content := item.get("content"), str):
            part: dict[str, Any] = {"type": "input_text", "text": content}
            if item.get("role") == "assistant":
                part = {"type": "output_text", "text": content, "annotations": []}
            ours["content"] = [part]
        if self._whole is None:
            return Raw(msgspec.json.encode({**ours, **{f: v for f, v in item.items() if f not in ours}}))
        # Of a field that comes twice the last one counts.
        fields = (bytes(self._whole)[1:-1].strip(), msgspec.json.encode(ours)[1:-1])
        return Raw(b"{%b}" % b",".join([part for part in fields if part]))


def _decoded_item(raw: Raw) -> dict[str, Any]:
    try:
        item = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, RecursionError):
        item = None  # what was given while it waited, and no engine could have taken
    return item if isinstance(item, dict) else {"type": "unknown", "value": item}


def _glimpsed_item(raw: Raw) -> dict[str, Any] | None:
    """What matters of an item; None of what is no object."""
    try:
        seen = msgspec.json.decode(raw, type=_Glimpse)
    except (msgspec.MsgspecError, RecursionError):
        return None
    item = {name: _glimpsed(getattr(seen, name)) for name in ("type", "id", "status", "role")}
    if bytes(memoryview(seen.content)[:1]) == b'"':
        item["content"] = _glimpsed(seen.content, most=sys.maxsize)
    return item


class _Glimpse(msgspec.Struct):
    type: Raw = _NULL
    id: Raw = _NULL
    status: Raw = _NULL
    role: Raw = _NULL
    content: Raw = _NULL


def _glimpsed(raw: Raw, most: int = 1024) -> Any:
    if len(memoryview(raw)) > most:
        return _LARGE
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, RecursionError):
        return _LARGE


def _type(item: Raw) -> str:
    try:
        kind = msgspec.json.decode(item, type=_Typed).type
    except (msgspec.MsgspecError, RecursionError):
        return ""
    return kind if isinstance(kind, str) else ""


class _Typed(msgspec.Struct):
    type: Any = None


def _taken_back(item: Raw) -> Raw:
    """An output item as input: without log-probabilities, which are large and say nothing to an engine."""
    if b'"logprobs"' not in bytes(item):
        return item
    fields = msgspec.json.decode(item)
    content = fields.get("content")
    if isinstance(content, list):
        for part in content:
            if isinstance(part, dict):
                part.pop("logprobs", None)
    return Raw(msgspec.json.encode(fields))
