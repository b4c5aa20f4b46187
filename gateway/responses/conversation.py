"""From a response that was kept to what an engine is sent, and from items to what a client is shown.

Engines keep nothing for us: they get the whole conversation as ``input``, and no ``previous_response_id``.
Instructions are of one request and are not carried over, as at OpenAI. Of what an engine has said, messages,
reasoning, and calls of a client's own tools go back to it; calls of tools that it ran itself do not, since
vLLM takes no such items as input, and neither do log-probabilities.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType
from pydantic import TypeAdapter, ValidationError

from gateway.errors import BadRequestError
from gateway.responses.store import Stored

RETURNED = frozenset(("message", "reasoning", "function_call", "custom_tool_call"))
"""Types of output items that an engine takes back as input."""
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_OBJECT = msgspec.json.Decoder(dict[str, Raw])
_ITEMS = msgspec.json.Decoder(list[Raw])
_FLAG = TypeAdapter(bool | None)
_ECHOED = (
    *("instructions", "metadata", "max_output_tokens", "max_tool_calls", "parallel_tool_calls", "reasoning"),
    *("temperature", "text", "tool_choice", "tools", "top_p", "truncation", "user", "service_tier"),
)
"""Fields of a request that its response shows as well."""
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
    asked: Callable[[str], bytes],
    model: str,
    previous: str | None,
) -> bytes:
    """The response object of a request in the background that no engine has answered. ``asked``: the JSON of
    its fields, empty for those that it does not have."""
    given = {name: raw for name in _ECHOED if (raw := asked(name)) and raw != b"null" and _is_plain(raw)}
    shown = {name: Raw(raw) for name, raw in given.items()}
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


def shown_items(chain: Sequence[Stored]) -> list[dict[str, Any]]:
    """The input of the chain's last response, the first item first, as OpenAI shows it: what its engine was
    given, each with an id."""
    shown: list[dict[str, Any]] = []
    for stored in chain:
        name = stored.id.removeprefix("resp_")
        shown += [_resource(item, f"{name}_{i}") for i, item in enumerate(_items(stored.input))]
        if stored is not chain[-1]:
            said = outputs(stored.response)
            shown += [_resource(item, f"{name}_o{i}") for i, item in enumerate(said)]
    return shown


def _resource(raw: Raw, name: str) -> dict[str, Any]:
    try:
        item = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, RecursionError):
        item = None  # what was given while it waited, and no engine could have taken
    if not isinstance(item, dict):
        item = {"type": "unknown", "value": item}
    kind = item.get("type") or "message"
    if not isinstance(kind, str):
        kind = "unknown"
    full: dict[str, Any] = {"id": f"{_PREFIXES.get(kind, 'item')}_{name}", "type": kind}
    if kind in ("message", "function_call", "function_call_output"):
        full["status"] = "completed"
    full.update({field: value for field, value in item.items() if value is not None or field not in full})
    full["type"] = kind
    if not isinstance(full["id"], str):
        full["id"] = f"item_{name}"
    if kind == "message" and isinstance(content := full.get("content"), str):
        part: dict[str, Any] = {"type": "input_text", "text": content}
        if full.get("role") == "assistant":
            part = {"type": "output_text", "text": content, "annotations": []}
        full["content"] = [part]
    return full


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
