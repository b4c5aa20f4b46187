"""Log-probabilities that only the gateway asked for are cut out of an answer; every other byte of it stays as
the engine wrote it: numbers, escapes, white space. A client cannot tell whether its answer is listened to.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Raw

from gateway.upstream.options import EVERY_TOKEN, OutputOptions
from gateway.upstream.sse import UNREADABLE, object_of

_OBJECT = msgspec.json.Decoder(dict[str, Raw])
_OBJECTS = msgspec.json.Decoder(list[dict[str, Raw]])
_LIST = msgspec.json.Decoder(list[Raw])
_ENCODE = msgspec.json.Encoder().encode
_NULL = Raw(b"null")
_BEGIN = re.compile(rb"[ \t\r\n]*+[\[{][ \t\r\n]*+")
_NAME = re.compile(rb'"([^"\\]*+(?:\\.[^"\\]*+)*+)"[ \t\r\n]*+:[ \t\r\n]*+')
_END = re.compile(rb"[ \t\r\n]*+\}[ \t\r\n]*+\Z")
_NEXT = re.compile(rb"[ \t\r\n]*+,[ \t\r\n]*+")
Change = Callable[[bytes], bytes]


def without_logprobs(raw: bytes, data: dict[str, Any], options: OutputOptions) -> bytes:
    """An answer, or an event of one, with no more log-probabilities than the client asked for; the same
    object where nothing has to go. ``data``: what ``raw`` says of its choices."""
    choices = data.get("choices")
    if not options.chat or not isinstance(choices, list):
        return raw
    kept = [_trim_choice(choice, options) for choice in choices]
    if all(new is old for new, old in zip(kept, choices, strict=True)):
        return raw
    with contextlib.suppress(*UNREADABLE, KeyError):
        if (plain := _compact(raw, options)) is not None:
            return plain
    with contextlib.suppress(*UNREADABLE):
        if raw.startswith((b"{", b" ", b"\n", b"\r", b"\t")):
            return _in_object(raw, "choices", lambda every: _in_items(every, lambda one: _cut(one, options)))
    # Another encoding, NaN, half a character, or a name that comes twice.
    return json.dumps({**object_of(raw), "choices": kept}).encode()


def _compact(raw: bytes, options: OutputOptions) -> bytes | None:
    """The quick way, for JSON as vLLM writes it: without white space, so that it is written again as it was.
    None for any other."""
    fields = _OBJECT.decode(raw)
    choices = _same_objects(fields["choices"])
    if choices is None or _ENCODE(fields) != raw:
        return None
    for choice in choices:
        held = bytes(choice.get("logprobs", _NULL))
        if not held.startswith(b"{"):
            continue
        if not options.logprobs:
            choice["logprobs"] = _NULL
            continue
        said = _OBJECT.decode(held)
        tokens = _same_objects(said["content"])
        if tokens is None or _ENCODE(said) != held:
            return None
        for token in tokens:
            likely = _LIST.decode(every := token["top_logprobs"])
            if b"[%b]" % b",".join(likely) != bytes(every):
                return None
            token["top_logprobs"] = Raw(b"[%b]" % b",".join(likely[: options.top_logprobs]))
        said["content"] = Raw(_ENCODE(tokens))
        choice["logprobs"] = Raw(_ENCODE(said))
    fields["choices"] = Raw(_ENCODE(choices))
    return _ENCODE(fields)


def _same_objects(array: Raw) -> list[dict[str, Raw]] | None:
    """The objects of an array, if they are written again as they were."""
    found = _OBJECTS.decode(array)
    return found if _ENCODE(found) == bytes(array) else None


def _cut(choice: bytes, options: OutputOptions) -> bytes:
    if not options.logprobs:
        return _in_object(choice, "logprobs", lambda held: b"null" if held.startswith(b"{") else held)

    def fewer(token: bytes) -> bytes:
        return _in_object(token, "top_logprobs", lambda likely: _first(likely, options.top_logprobs))

    return _in_object(
        choice, "logprobs", lambda held: _in_object(held, "content", lambda tokens: _in_items(tokens, fewer))
    )


def _first(array: bytes, most: int) -> bytes:
    if not array.startswith(b"["):
        return array
    places = _items(array)
    return array[: places[most - 1][1] if most else 1] + b"]" if len(places) > most else array


def _in_object(raw: bytes, name: str, change: Change) -> bytes:
    """A JSON object with one of its values changed; anything else as it is. Raises what decoders do."""
    begin = _BEGIN.match(raw)
    if begin is None or not begin.group().lstrip().startswith(b"{"):
        return raw
    fields, at, found = _OBJECT.decode(raw), begin.end(), None
    for _ in fields:
        named = _NAME.match(raw, at)
        if named is None:
            raise ValueError("a name comes twice")
        spelled, start = named.group(1), named.end()
        own = json.loads(b'"%b"' % spelled) if b"\\" in spelled else spelled.decode()
        end = start + len(bytes(fields[own]))
        if own == name:
            found = start, end
        more = _NEXT.match(raw, end)
        at = end if more is None else more.end()
    if _END.match(raw, at) is None:
        raise ValueError("a name comes twice")
    return raw if found is None else raw[: found[0]] + change(raw[found[0] : found[1]]) + raw[found[1] :]


def _in_items(raw: bytes, change: Change) -> bytes:
    """A JSON array with all of its items changed; anything else as it is. Raises what decoders do."""
    if not raw.startswith(b"["):
        return raw
    parts: list[bytes] = []
    at = 0
    for begin, end in _items(raw):
        parts += raw[at:begin], change(raw[begin:end])
        at = end
    return b"".join(parts) + raw[at:]


def _items(array: bytes) -> list[tuple[int, int]]:
    """Where the items of an array stand."""
    begin, places = _BEGIN.match(array), []
    assert begin is not None
    at = begin.end()
    for item in _LIST.decode(array):
        end = at + len(bytes(item))
        places.append((at, end))
        more = _NEXT.match(array, end)
        at = end if more is None else more.end()
    return places


def _trim_choice(choice: Any, options: OutputOptions) -> Any:
    logprobs = choice.get("logprobs") if isinstance(choice, dict) else None
    if not isinstance(logprobs, dict):
        return choice
    if not options.logprobs:
        return {**choice, "logprobs": None}
    content, n = logprobs.get("content"), options.top_logprobs
    if n == EVERY_TOKEN or not isinstance(content, list):
        return choice
    trimmed = [_trim_token(token, n) for token in content]
    if all(new is old for new, old in zip(trimmed, content, strict=True)):
        return choice
    return {**choice, "logprobs": {**logprobs, "content": trimmed}}


def _trim_token(token: Any, n: int) -> Any:
    likely = token.get("top_logprobs") if isinstance(token, dict) else None
    return {**token, "top_logprobs": likely[:n]} if isinstance(likely, list) and len(likely) > n else token
