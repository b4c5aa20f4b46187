"""The body of a completion request: read, parsed, and checked as far as the gateway depends on it.

Fields that are not named here pass as they are: the engine knows its own dialect. A refusal names the
field, the value's type and the fix.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.types import Receive

from gateway.errors import BadRequestError, BodyTooLargeError, ClientGoneError

_ROLES = ("assistant", "developer", "function", "system", "tool", "user")
_DISCARD_FACTOR = 8
_DISCARD_SECONDS = 2.0


async def read_body(receive: Receive, headers: Mapping[str, str], limit: int) -> bytes:
    """The whole body. Raises BodyTooLargeError beyond ``limit`` bytes, ClientGoneError."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # Also what keeps a web page from posting here unasked: browsers send this type only after a
        # preflight request, which the gateway does not answer.
        raise BadRequestError(
            "content-type: send the header `content-type: application/json`", param="content-type"
        )
    length = headers.get("content-length", "")
    declared = int(length) if length.isascii() and length.isdigit() and len(length) < 19 else 0
    chunks, size, more = [], 0, True
    while more and max(size, declared) <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError("The client left while sending its request.")
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        more = message.get("more_body", False)
    if max(size, declared) > limit:
        if more:
            await _discard(receive, limit * _DISCARD_FACTOR)
        raise BodyTooLargeError(f"The body is larger than the limit of {limit} bytes; send less context.")
    return b"".join(chunks)


async def _discard(receive: Receive, limit: int) -> None:
    """Read on for a while: a client that is still sending would see a reset instead of the answer."""
    size = 0
    try:
        async with asyncio.timeout(_DISCARD_SECONDS):
            while size <= limit:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def parse_body(raw: bytes, *, chat: bool) -> dict[str, Any]:
    """The request as a mapping, checked. Raises BadRequestError."""
    try:
        body = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadRequestError(f"The body is not valid JSON ({reason}); send a JSON object.") from None
    if not isinstance(body, dict):
        raise BadRequestError(f"The body is {_kind(body)}; send a JSON object.")
    _check_common(body)
    if chat:
        _check_messages(body)
        _expect(body, "logprobs", (bool,), "true or false")
        _expect(body, "top_logprobs", (int,), "a whole number from 0 to 20")
        if (body.get("top_logprobs") or 0) < -1:
            raise _bad("top_logprobs", f"is {body['top_logprobs']}", "send a whole number from 0 to 20")
    elif "prompt" not in body:
        raise _bad("prompt", "is missing", "send the text to continue")
    return body


def _check_common(body: dict[str, Any]) -> None:
    if "model" not in body:
        raise _bad("model", "is missing", "name a model, a role or model:variant; GET /v1/models lists them")
    if not isinstance(body["model"], str) or not body["model"]:
        raise _bad("model", f"is {_kind(body['model'])}", "send a model id as a non-empty string")
    _expect(body, "stream", (bool,), "true or false")
    _expect(body, "stream_options", (dict,), 'an object such as {"include_usage": true}')
    _expect(body, "temperature", (int, float), "a number such as 0.7")
    for field in ("max_tokens", "max_completion_tokens"):
        _expect(body, field, (int,), "a whole number of at least 1")
        if body.get(field) is not None and body[field] < 1:
            raise _bad(field, f"is {body[field]}", "send a whole number of at least 1")


def _check_messages(body: dict[str, Any]) -> None:
    fix = 'send a list such as [{"role": "user", "content": "Hello"}]'
    if "messages" not in body:
        raise _bad("messages", "is missing", fix)
    messages = body["messages"]
    if not isinstance(messages, list):
        raise _bad("messages", f"is {_kind(messages)}", fix)
    if not messages:
        raise _bad("messages", "is empty", fix)
    for index, message in enumerate(messages):
        _check_message(f"messages[{index}]", message)


def _check_message(where: str, message: Any) -> None:
    if not isinstance(message, dict):
        raise _bad(where, f"is {_kind(message)}", "send an object with role and content")
    if "role" not in message:
        raise _bad(f"{where}.role", "is missing", f"use one of {', '.join(_ROLES)}")
    role = message["role"]
    if not isinstance(role, str):
        raise _bad(f"{where}.role", f"is {_kind(role)}", f"use one of {', '.join(_ROLES)}")
    if role not in _ROLES:
        raise _bad(f"{where}.role", f"is {role[:40]!r}", f"use one of {', '.join(_ROLES)}")
    content = message.get("content")
    if content is not None and not isinstance(content, str | list):
        raise _bad(f"{where}.content", f"is {_kind(content)}", "send a string or a list of parts")
    for index, part in enumerate(content if isinstance(content, list) else ()):
        if not isinstance(part, dict):
            fix = 'send an object such as {"type": "text", "text": "Hello"}'
            raise _bad(f"{where}.content[{index}]", f"is {_kind(part)}", fix)


def _expect(body: dict[str, Any], field: str, types: tuple[type, ...], wanted: str) -> None:
    """Refuse a value of another type. Null means absent, as OpenAI's clients send it; bool is no int."""
    value = body.get(field)
    if value is None or (isinstance(value, types) and (bool in types or not isinstance(value, bool))):
        return
    raise _bad(field, f"is {_kind(value)}", f"send {wanted}")


def _bad(field: str, what: str, fix: str) -> BadRequestError:
    return BadRequestError(f"{field}: {what}; {fix}", param=field)


def _kind(value: Any) -> str:
    """The JSON name of a value's type, with its article."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), "a number")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
