"""Where the first-level fields of a large JSON object stand, found in short steps.

One step looks at no more than ``WINDOW`` bytes: whoever runs a scan may let others have their turn after
each (``proxy/large.py``). Nothing is decoded but short names. What lies within a field is not checked beyond
its strings and brackets: the engine reads it, and says what it thinks of it. For everything that a parser of
JSON takes, both see the same fields.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from itertools import accumulate
from typing import NamedTuple, NoReturn, TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]

WINDOW = 32 << 10
"""Bytes of a step."""
MOST_FIELDS = 10_000
"""Of one object. Whatever clients send has a few dozen."""
MOST_DEPTH = 1000
"""As deep as Python's own parser goes."""
LONGEST_NAME = 256
"""Bytes of a name that anybody asks for."""
_FIRST_WINDOW, _NARROW = 1 << 10, 64
_AT_ONCE = 32
"""Short fields in one step."""
_ROUNDS, _MOST_COUNTED = 16, 4096
_PAIRS = tuple(b"[" * deep + b"]" * deep for deep in (64, 8, 1))
_SPACE = re.compile(rb"[ \t\r\n]*+")
_SCALAR = re.compile(rb"[-+.0-9A-Za-z]*+")
_NAME = re.compile(rb'"([^"\\]{0,256}+)"[ \t\r\n]{0,64}+:[ \t\r\n]{0,64}+')
_TOKENS = re.compile(rb'["\[\]{}]')
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_OTHERS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {0x5B: 1, 0x5D: -1}
_OPENING = (b"[", b"{")


class Found(NamedTuple):
    """``fields``: where the value of each name begins and ends, the last one's where a name comes twice.
    ``close``: where the brace that ends the object stands."""

    fields: dict[str, tuple[int, int]]
    close: int


class NotJsonError(ValueError):
    """It is no JSON object."""


class TooDeepError(ValueError):
    """It is nested more than ``MOST_DEPTH`` times."""


class TooManyFieldsError(ValueError):
    """It has more than ``MOST_FIELDS`` fields."""


def first_level(raw: bytes) -> Steps[Found]:
    """The fields of the object that is all there is but for white space. Raises NotJsonError, TooDeepError or
    TooManyFieldsError."""
    at = yield from _space(raw, 0)
    if raw[at : at + 1] != b"{":
        _refuse(raw, at, "it is no object")
    fields: dict[str, tuple[int, int]] = {}
    at = yield from _space(raw, at + 1)
    if raw[at : at + 1] != b"}":
        count = 0
        while True:
            name, start = yield from _name(raw, at)
            at = yield from _value(raw, start)
            if name is not None:
                fields[name] = start, at
            count += 1
            if count > MOST_FIELDS:
                raise TooManyFieldsError
            if not count % _AT_ONCE:
                yield
            at = yield from _space(raw, at)
            after = raw[at : at + 1]
            if after == b"}":
                break
            if after != b",":
                _refuse(raw, at, "a comma or a brace is missing")
            at = yield from _space(raw, at + 1)
    end = yield from _space(raw, at + 1)
    if end != len(raw):
        _refuse(raw, end, "something follows the object")
    return Found(fields, at)


def count_items(raw: bytes, begin: int, most: int) -> Steps[int]:
    """How many values the array has that begins at ``begin``; ``most`` where it has more. Raises
    NotJsonError or TooDeepError."""
    at = yield from _space(raw, begin + 1)
    if raw[at : at + 1] == b"]":
        return 0
    count = 0
    while count < most:
        at = yield from _value(raw, at)
        count += 1
        if not count % _AT_ONCE:
            yield
        at = yield from _space(raw, at)
        if raw[at : at + 1] != b",":
            break
        at = yield from _space(raw, at + 1)
    return count


def _refuse(raw: bytes, at: int, why: str) -> NoReturn:
    raise NotJsonError("it is cut off" if at >= len(raw) else f"{why} (byte {at})")


def _space(raw: bytes, at: int) -> Steps[int]:
    """Where what is no white space begins."""
    size = len(raw)
    while True:
        found = _SPACE.match(raw, at, min(at + WINDOW, size))
        assert found is not None
        if found.end() - at < WINDOW:
            return found.end()
        at = found.end()
        yield


def _name(raw: bytes, at: int) -> Steps[tuple[str | None, int]]:
    """A field's name, and where its value begins. None for one that is too long to be asked for."""
    found = _NAME.match(raw, at)
    if found is not None:
        name, start = found.group(1), found.end()
        start = yield from _space(raw, start)
        return _decoded(name, at), start
    if raw[at : at + 1] != b'"':
        _refuse(raw, at, "a field's name is missing")
    end = yield from _string(raw, at + 1)
    start = yield from _space(raw, end)
    if raw[start : start + 1] != b":":
        _refuse(raw, start, "a colon is missing")
    start = yield from _space(raw, start + 1)
    if end - at > 6 * LONGEST_NAME:
        return None, start
    try:
        return str(json.loads(_decoded(raw[at:end], at))), start
    except json.JSONDecodeError as error:
        raise NotJsonError(f"a field's name cannot be read: {error} (byte {at})") from None


def _decoded(name: bytes, at: int) -> str:
    """As ``json`` does it: with halves of characters."""
    try:
        return name.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise NotJsonError(f"a field's name cannot be read: {error} (byte {at})") from None


def _value(raw: bytes, at: int) -> Steps[int]:
    """Where a value ends."""
    first = raw[at : at + 1]
    if first == b'"':
        return (yield from _string(raw, at + 1))
    if first in _OPENING:
        return (yield from _nested(raw, at + 1))
    size, begin = len(raw), at
    while True:
        found = _SCALAR.match(raw, at, min(at + WINDOW, size))
        assert found is not None
        if found.end() == begin:
            _refuse(raw, begin, "a value is missing")
        if found.end() - at < WINDOW:
            return found.end()
        at = found.end()
        yield


def _piece(raw: bytes, at: int, window: int) -> bytes:
    """Bytes of a string, or of what has strings: as many as they were, without escapes that could be taken
    for the end of a string, and none that is cut in two."""
    piece = raw[at : at + window]
    if b"\\" in piece:
        if piece.endswith(b"\\") and (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            piece = piece[:-1]
        piece = piece.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    if not piece:
        _refuse(raw, len(raw), "")
    return piece


def _string(raw: bytes, at: int) -> Steps[int]:
    """Where a string ends, behind its quote; ``at`` is behind the first one."""
    window = _FIRST_WINDOW
    while True:
        piece = _piece(raw, at, window)
        quote = piece.find(b'"')
        if quote >= 0:
            return at + quote + 1
        at += len(piece)
        window = min(8 * window, WINDOW)
        yield


def _nested(raw: bytes, at: int) -> Steps[int]:
    """Where an array or an object ends, behind its bracket; ``at`` is behind the first one. Which kind a
    bracket is of is not looked at: where they do not match it is no JSON, and the engine will say so."""
    depth, within, window = 1, 0, _NARROW
    while True:
        piece = _piece(raw, at, window)
        parts = piece.split(b'"')
        brackets = b"".join(parts[within::2]).translate(_BRACKETS, _OTHERS)
        opened, closed = brackets.count(b"["), brackets.count(b"]")
        if closed >= depth:
            lowest = _lowest(brackets)
            if lowest is None or depth + lowest <= 0:
                if window <= _NARROW:
                    return at + _closing(piece, depth, within)
                window //= 8  # the end is near
                yield
                continue
        depth += opened - closed
        if depth > MOST_DEPTH:
            raise TooDeepError
        within ^= (len(parts) - 1) & 1
        at += len(piece)
        window = min(8 * window, WINDOW)
        yield


def _lowest(brackets: bytes) -> int | None:
    """How far the depth falls below where it was: 0 or less. None where that takes too long to know."""
    for _ in range(_ROUNDS):
        size = len(brackets)
        for pairs in _PAIRS:
            brackets = brackets.replace(pairs, b"")
        if len(brackets) == size:
            return -brackets.count(b"]")
    if len(brackets) > _MOST_COUNTED:
        return None
    return min(0, min(accumulate(map(_STEP.__getitem__, brackets))))


def _closing(piece: bytes, depth: int, within: int) -> int:
    """Behind the bracket with which the depth comes to nothing."""
    for token in _TOKENS.finditer(piece):
        kind = token.group()
        if kind == b'"':
            within ^= 1
        elif not within:
            depth += 1 if kind in _OPENING else -1
            if not depth:
                return token.end()
    raise AssertionError("there is no such bracket")
