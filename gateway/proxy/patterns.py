"""Patterns that an engine would make part of a grammar, and how large they become there.

An engine writes counted repetitions out: ``^(a{1,9999}){1,9999}$`` has twenty letters and makes a hundred
million states, for which everybody else waits. So what a request gives the engine to make grammars of
(``GRAMMAR_FIELDS``) is looked at before it goes there. Nothing is compiled here, and most of it is not even
read: where no brace is followed by a digit nothing is repeated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from msgspec import Raw

from gateway.errors import BadRequestError
from gateway.proxy.body import value_of
from gateway.proxy.scan import WINDOW, Steps

Buffer = bytes | memoryview

MOST = 1 << 40
"""Sizes are not told apart beyond."""
LARGEST_BYTES = 1 << 20
"""Of a field that has repetitions: it is made objects of as a whole."""
_AT_ONCE = 500
"""Values, or letters of a pattern, in one step."""
_SIGNS = tuple(re.compile(sign) for sign in (rb"\{\s{0,8}\d", rb"~\s{0,8}\d", rb"\\u00"))
"""Each begins with a letter of its own: they are searched for at a byte per half a nanosecond."""
_SPAN = 16
"""Bytes that one may take."""
_LEVELS, _SHOWN = 64, 64
"""Of a place that is shown, and letters of a name."""
_TOKEN = re.compile(
    r"\\.|\[(?:\\.|[^\]\\])*+\]|\{\s*(\d*)\s*(,?)\s*(\d*)\s*\}|~\s*(\d+)(?:\s*\.\.\s*(\d+))?|[()|]|[*+?]|.",
    re.DOTALL,
)
_PATTERNS = ("pattern", "regex", "grammar", "definition", "whitespace_pattern")
"""Names whose text is a pattern, or a grammar that may repeat as one does."""
_JSON = ("json", "structural_tag")
"""Names whose text is a schema."""
_TEXTS = frozenset((*_PATTERNS, *_JSON))


def expanded(pattern: str) -> Steps[int]:
    """How many letters, classes and groups' parts a pattern has with its counted repetitions written out; not
    more than ``MOST``. Of a repetition without an end its beginning counts. Takes time in proportion to the
    pattern's length, whatever it is."""
    outer: list[tuple[int, int]] = []
    whole = last = 0
    """Of the group that is being read: all of it, and its last part, which what follows may repeat."""
    for count, token in enumerate(_TOKEN.finditer(pattern), 1):
        if not count % _AT_ONCE:
            yield
        text = token.group()
        if text == "(":
            outer.append((whole, last))
            whole = last = 0
        elif text == ")":
            if outer:
                before, _ = outer.pop()
                last = max(whole, 1)
                whole = min(before + last, MOST)
        elif text == "|":
            last = 0
        elif text in "*+?":
            pass
        elif token.lastindex and (times := _times(token)) is not None:
            whole, last = min(whole + last * (times - 1), MOST), min(last * times, MOST)
        else:
            whole, last = whole + 1, 1
    return min(whole + sum(before for before, _ in outer), MOST)


def _times(token: re.Match[str]) -> int | None:
    """How often the part before it may come; None where it is no counted repetition."""
    counts = [digits for digits in token.group(1, 3, 4, 5) if digits]
    if not counts:
        return None
    return max(1, *(MOST if len(digits) > 12 else int(digits) for digits in counts))


def _repeats(raw: Buffer) -> bool:
    """Whether there may be a counted repetition in a JSON text, whatever it is spelled like."""
    return any(sign.search(raw) for sign in _SIGNS)


def repeats(raw: Buffer) -> Steps[bool]:
    """The same of a long one."""
    for at in range(0, len(raw), WINDOW):
        if _repeats(raw[at : at + WINDOW + _SPAN]):
            return True
        yield
    return False


def look(fields: Sequence[tuple[str, Raw]], most: int) -> Steps[None]:
    """Raises BadRequestError where the patterns of a request's ``fields`` are larger than ``most`` together,
    or take too long to be looked at."""
    total, largest = 0, None
    for field, raw in fields:
        view = memoryview(raw)
        if not (yield from repeats(view)):
            continue
        if len(view) > LARGEST_BYTES:
            raise BadRequestError(
                f"{field}: has {len(view):,} bytes and counted repetitions, for which at most "
                f"{LARGEST_BYTES:,} are read; send a smaller one",
                param=field,
            )
        value = value_of(field, view)
        yield
        for count, (place, pattern) in enumerate(_texts(value)):
            if pattern is not None:
                # One that is long enough is too large by that alone, and reading it would take its time.
                size = len(pattern) if len(pattern) > most else (yield from expanded(pattern))
                total += size
                if largest is None or size > largest[0]:
                    largest = size, field + _path(place), pattern
            if not count % _AT_ONCE:
                yield
    if largest is not None and total > most:
        raise _refusal(total, most, *largest)


def _refusal(total: int, most: int, size: int, where: str, pattern: str) -> BadRequestError:
    many = "more than a million million" if size >= MOST else f"{size:,}"
    said = f"{where}: {pattern[:_SHOWN]!r} has {many} letters with its repetitions written out"
    if size <= most:
        said += f", and all patterns together {total:,}"
    return BadRequestError(
        f"{said}; an engine would compile that while everybody waits. At most {most:,} are taken "
        "(gateway.max_pattern_size): repeat less often, or leave the length to whoever reads the answer",
        param=where[:_LEVELS],
        internal="a pattern of a schema is too large",
    )


_Place = tuple["_Place", str | int] | None
"""Where a value stands: where what holds it does, and its name or number there."""


def _texts(value: Any) -> Iterator[tuple[_Place, str | None]]:
    """Every value, with the pattern that it is if it is one."""
    left: list[tuple[_Place, str | int, Any]] = [(None, "", value)]
    while left:
        place, name, value = left.pop()
        if isinstance(value, dict):
            yield place, None
            for key, item in value.items():
                if isinstance(item, dict | list) or (isinstance(item, str) and key in _TEXTS):
                    left.append(((place, key), key, item))
                if name == "patternProperties":
                    yield (place, key), key
        elif isinstance(value, list):
            yield place, None
            left.extend(
                ((place, at), at, item) for at, item in enumerate(value) if isinstance(item, dict | list)
            )
        elif name in _JSON:
            with suppress(BadRequestError):
                left.append((place, "", value_of(str(name), value.encode(errors="surrogatepass"))))
        else:
            yield place, value


def _path(place: _Place) -> str:
    names: list[str] = []
    while place is not None:
        place, name = place
        names.append(f"[{name}]" if isinstance(name, int) else f".{name[:_SHOWN]}")
    return "".join(reversed(names[:_LEVELS]))
