"""What pydantic, and so vLLM, makes of a value, and how a refusal says what was sent instead."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gateway.errors import BadRequestError

BOOL: TypeAdapter[bool | None] = TypeAdapter(bool | None)
INT: TypeAdapter[int | None] = TypeAdapter(int | None)
STREAM_OPTIONS_FIX = 'send an object such as {"include_usage": true}'


def stream_options_of(given: Any) -> dict[str, Any] | None:
    fix = STREAM_OPTIONS_FIX
    if given is None:
        return None
    if not isinstance(given, dict):
        raise bad("stream_options", given, fix)
    read = dict(given)
    for name in ("include_usage", "continuous_usage_stats"):
        if name in read:
            read[name] = needed(BOOL, f"stream_options.{name}", read[name], "send true or false")
    return read


def needed(adapter: TypeAdapter[Any], field: str, value: Any, fix: str) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError:
        raise bad(field, value, fix) from None


def coerced(adapter: TypeAdapter[Any], value: Any, otherwise: Any = None) -> Any:
    """What vLLM makes of a value; ``otherwise`` where it can make nothing of it, and says so itself."""
    try:
        return adapter.validate_python(value)
    except ValidationError:
        return otherwise


def bad(field: str, value: Any, fix: str) -> BadRequestError:
    said = f"{field}: is {kind_of(value)}; {fix}"  # what it is may be anything that a client has put there
    return BadRequestError(f"{field}: is {_shown(value)}; {fix}", param=field, internal=said)


def _shown(value: Any) -> str:
    """A value as an error shows it, and of what kind it is: never much of it."""
    if value is None or isinstance(value, dict | list):
        return kind_of(value)
    return f"{kind_of(value)} ({json.dumps(value)[:40]})"


def kind_of(value: Any) -> str:
    """The JSON name of a value's type, with its article."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), "a number")


def kind_of_json(raw: bytes) -> str:
    examples: dict[bytes, Any] = {b'"': "", b"[": [], b"n": None, b"t": True, b"f": False}
    return kind_of(examples.get(raw.lstrip()[:1], 0))
