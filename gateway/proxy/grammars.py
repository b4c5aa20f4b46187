"""What of a request's schemas an engine would write out: repetitions of patterns, items of arrays, multiples.

``^(a{1,9999}){1,9999}$`` has twenty letters, and an engine compiles it for minutes, for most of which all its
other clients wait. So what engines make grammars of (``GRAMMAR_FIELDS``) is looked at before it goes
there. Nothing is compiled here, and most of it is not even read: only where a number counts something.

What was seen of vLLM 0.32, by its two compilers: xgrammar takes 0.1 us times the square of a repetition's
count, at first where requests come in, then where they are computed; guidance, which takes over where
xgrammar does not know something, 14 us for each of ``maxItems``, with a thousand million of which it dies of
memory, and 5 us for each number below the least common multiple of ``multipleOf``. ``maxLength``,
``maxProperties``, bounds of integers and ``$ref`` cost next to nothing by their numbers. Of a grammar it is
the text that guidance has to look ahead at, 1 us a letter, before the first token. What is large
because the schema itself is (a hundred thousand names in an ``enum``) is left to ``max_body_bytes``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from msgspec import Raw

from gateway.config import Config
from gateway.errors import BadRequestError
from gateway.proxy.body import LARGE_BYTES, value_of
from gateway.proxy.exchange import Exchange
from gateway.proxy.large import LargeReader
from gateway.proxy.productions import MOST, sizes
from gateway.proxy.scan import WINDOW, Steps

Buffer = bytes | memoryview

LARGEST_BYTES = 1 << 20
"""Of a field that has repetitions or a grammar: it is made objects of as a whole."""
LONGEST_GRAMMAR = 1 << 17
"""Letters of one: what is read here takes a microsecond for each."""
MOST_KNOWN = 4096
"""Sets of schemas that are known to be small enough."""
_AT_ONCE = 500
"""Values, or letters of a pattern, in one step."""
_SPACE = rb"(?:[\s,\x80-\xff]++|(?:\\[tnrf])++|\\++[tnrf])*+"
"""What may stand before a count, however much of it: any white space, also as JSON within JSON has it."""
_SPELLED = rb"\\++u(?:0085|00[aA]0|1680|20[0-6]|3000)"
"""White space beyond ASCII."""
_SIGNS = (
    re.compile(rb"\{(?=[^\"{}\[])" + _SPACE + rb"(?:[\d#]|" + _SPELLED + rb")"),
    re.compile(rb"~(?=[^~])" + _SPACE + rb"(?:[\d+]|" + _SPELLED + rb")"),
    re.compile(rb"Items(?<=m(?:in|ax)Items)"),
    re.compile(rb"O(?<=multipleO)f"),
    re.compile(rb"grammar\\{0,15}+\""),
    re.compile(rb"definition\\{0,15}+\""),
    re.compile(rb"\\u00[0-7]"),
)
"""Of counts, of a comment before one, of grammars, and of letters that are spelled otherwise. One by one they
are searched for at a byte per half a nanosecond, and never for longer than in proportion to the bytes."""
_OPEN = re.compile(_SPACE + rb"(?:\\*(\\(?:u[0-9a-fA-F]{0,3})?))?")
_SPAN = 32
"""Bytes that any other may take."""
_LEVELS, _LONGEST_SHOWN = 32, 64
"""Of a place that is shown, and letters of a name or a value."""
_CLASS = r"\[(?:\\.|[^\]\\])*+\]|"
_BUT_CLASSES = (
    r"\\.|\{[\s,]*+(\d++)(?:[\s,]*+(\d++))?[\s,]*+\}?|\n(?:[^\S\n]|,)*+(\d++)(?:[\s,]*+(\d++))?[\s,]*+[}#]"
    r"|~\s*+\+?(\d++)(?:\s*+\.\.\s*+\+?(\d++))?|."
)
"""A count at the beginning of a line goes on behind a comment: no other line begins so. Nothing is read more
than a few times, whatever it is."""
_TOKEN, _TOKEN_BUT_CLASSES = (re.compile(token, re.DOTALL) for token in (_CLASS + _BUT_CLASSES, _BUT_CLASSES))
_VERBOSE = re.compile(r"\(\?[imsuUR]*+x")
_GRAMMARS = ("grammar", "definition")
_SEPARATORS = ("whitespace_pattern", "item_separator", "key_separator")
"""Patterns too, of guidance alone."""
_PATTERNS = ("pattern", "regex", *_SEPARATORS)
"""Names whose text is a pattern."""
_TEXTS = (*_PATTERNS, *_GRAMMARS)
_SCHEMA_WITHIN = re.compile(r"%json\s*+(?=[\[{])")
_NO_SCHEMA = "%json"
"""Instead of a name: before what is no JSON."""
_JSON_AT = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) < 20 else MOST).raw_decode
_JSON = ("json", "structural_tag")
"""Names whose text is a schema."""
_ITEMS, _MULTIPLE = ("minItems", "maxItems"), "multipleOf"
TOGETHER = 4
"""All patterns of a request may be so many times as large as one."""


def expanded(pattern: str) -> Steps[int]:
    """How many letters, classes and groups' parts a pattern has with its counted repetitions written out; not
    more than ``MOST``. Of a repetition without an end its beginning counts. Takes time in proportion to the
    pattern's length, whatever it is."""
    spaced = _VERBOSE.search(pattern) is not None  # white space and comments may stand before a repetition
    outer: list[tuple[int, int]] = []
    whole = last = 0
    """Of the group that is being read: all of it, and its last part, which what follows may repeat."""
    for count, token in enumerate(_tokens(pattern), 1):
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
        elif text in "*+?^$":
            pass
        elif token.lastindex:
            times = _times(token)
            last = whole if text[0] == "\n" else last  # of what: that was before a comment
            whole, last = min(whole + last * (times - 1), MOST), min(last * times, MOST)
        elif spaced and text.isspace():
            whole, last = whole + 1, whole if text == "\n" else last
        else:
            whole, last = whole + 1, 1
    return min(whole + sum(before for before, _ in outer), MOST)


def _tokens(pattern: str) -> Iterator[re.Match[str]]:
    for token in _TOKEN.finditer(pattern):
        yield token
        if token.group() == "[":  # nothing ends a class any more, and nobody looks for it again
            yield from _TOKEN_BUT_CLASSES.finditer(pattern, token.end())
            return


def _times(token: re.Match[str]) -> int:
    """How often the part before it may come."""
    return max(1, *(MOST if len(digits) > 12 else int(digits) for digits in token.groups() if digits))


class BoundGrammars:
    """No grammar that an engine would compile for long. A request without schemas costs a
    glance, and what was looked at lately is not looked at again: agents send the same tools each time."""

    def __init__(self, config: Config, large: LargeReader) -> None:
        self._bounds = Bounds(config.gateway.max_pattern_size, config.gateway.max_schema_count)
        self._large = large
        self._fine: set[int] = set()
        """Hashes of fields, which differ from process to process."""

    def __call__(self, exchange: Exchange) -> Awaitable[None] | None:
        """Raises BadRequestError, which names the field and the pattern or number."""
        fields = exchange.body.grammars()
        if not fields:
            return None
        known = hash(tuple(bytes(raw) for _, raw in fields)) if exchange.body.size <= LARGE_BYTES else None
        if known in self._fine:
            return None
        return self._large.begin(self._look(fields, known))

    def _look(self, fields: Sequence[tuple[str, Raw]], known: int | None) -> Steps[None]:
        look = Look(self._bounds)
        for field, raw in fields:
            yield from look.at(field, memoryview(raw))
        if known is not None:
            if len(self._fine) >= MOST_KNOWN:
                self._fine.clear()
            self._fine.add(known)


class Bounds(NamedTuple):
    """Limits of one request, by their settings in ``gateway``."""

    pattern: int
    """``max_pattern_size``: of one pattern; all together may have ``TOGETHER`` times as many."""
    counted: int
    """``max_schema_count``."""


class Look:
    """One look at the fields of a request."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._size = self._items = 0
        self._multiple = 1

    def at(self, field: str, raw: Buffer) -> Steps[None]:
        """Raises BadRequestError where an engine would take too long with it, or the look would."""
        if not (yield from _counts(raw)):
            return
        if len(raw) > LARGEST_BYTES:
            raise BadRequestError(
                f"{field}: has {len(raw):,} bytes and counted repetitions or a grammar, for which at most "
                f"{LARGEST_BYTES:,} are read; send a smaller one",
                param=field,
            )
        value = value_of(field, raw)
        yield
        for count, (place, name, found) in enumerate(_found(value)):
            if name in _PATTERNS:
                yield from self._pattern(field, place, found)
            elif name in _GRAMMARS:
                yield from self._grammar(field, place, found)
            elif name == _NO_SCHEMA:
                raise self._unreadable(field, place)
            elif name in _ITEMS:
                self._items += found
                if self._items > self._bounds.counted:
                    raise self._too_many(field, place, found, f"all of a request together {self._items:,}")
            elif name == _MULTIPLE:
                self._multiple = math.lcm(self._multiple, found)
                if self._multiple > self._bounds.counted:
                    said = f"the least common multiple of all of a request is {min(self._multiple, MOST):,}"
                    raise self._too_many(field, place, found, said)
            if not count % _AT_ONCE:
                yield

    def _grammar(self, field: str, place: _Place, grammar: str) -> Steps[None]:
        where = _where(field, place)
        if len(grammar) > LONGEST_GRAMMAR:
            said = f"has {len(grammar):,} letters; a grammar may have {LONGEST_GRAMMAR:,}"
            raise BadRequestError(f"{where}: {said}", param=where)
        grown, forced = yield from sizes(grammar)
        self._count(field, place, grammar, grown)
        if forced > self._bounds.counted + len(grammar):
            raise BadRequestError(
                f"{where}: {_shown(grammar)} forces answers of {forced:,} letters, its rules written out; an "
                "engine would look ahead at them while everybody waits. At most "
                f"{self._bounds.counted:,} more than it has itself are taken (gateway.max_schema_count): "
                "repeat less often",
                param=where,
                internal="a grammar forces too long an answer",
            )

    def _pattern(self, field: str, place: _Place, pattern: str) -> Steps[None]:
        # One that is long enough is too large by that alone, and reading it would take its time.
        long = len(pattern) > TOGETHER * self._bounds.pattern
        self._count(field, place, pattern, len(pattern) if long else (yield from expanded(pattern)))

    def _count(self, field: str, place: _Place, pattern: str, size: int) -> None:
        """What one is with its repetitions written out. Raises BadRequestError."""
        most = self._bounds.pattern
        self._size += size
        if size <= most and self._size <= TOGETHER * most:
            return
        where = _where(field, place)
        said = f"has {size:,} letters with its repetitions written out"
        if size <= most:
            said += f", and all of a request so far {self._size:,}"
        raise BadRequestError(
            f"{where}: {_shown(pattern)} {said}; an engine would compile that while everybody waits. At most "
            f"{most:,} are taken, and {TOGETHER} times as many in all (gateway.max_pattern_size): repeat "
            "less often, or leave the length to whoever reads the answer",
            param=where,
            internal="a pattern of a schema is too large",
        )

    def _unreadable(self, field: str, place: _Place) -> BadRequestError:
        """Not all engines are as strict as ``json``, so that they might read what was not looked at."""
        where = _where(field, place)
        said = "has a %json before what is no JSON as RFC 8259 has it; send a schema there"
        return BadRequestError(f"{where}: {said}", param=where)

    def _too_many(self, field: str, place: _Place, found: int, said: str) -> BadRequestError:
        where = _where(field, place)
        return BadRequestError(
            f"{where}: is {_shown(found)}, and {said}; an engine may write all of it out. At most "
            f"{self._bounds.counted:,} are taken (gateway.max_schema_count): give a smaller number, or none",
            param=where,
            internal="a number of a schema is too large",
        )


def _counts(raw: Buffer) -> Steps[bool]:
    """Whether there may be a pattern with a counted repetition, or a number that counts, in a JSON text,
    whatever it is spelled like."""
    held = b""
    for at in range(0, len(raw), WINDOW):
        window = held + bytes(raw[at : at + WINDOW])
        if any(sign.search(window) for sign in _SIGNS):
            return True
        held = _unfinished(window)
        yield
    return False


def _unfinished(window: bytes) -> bytes:
    """What of it the next one may go on with: of a brace that only space has followed so far, no space."""
    begin = max(window.rfind(b"{"), window.rfind(b"~"))
    found = _OPEN.fullmatch(window, begin + 1) if begin >= 0 else None
    return window[-_SPAN:] if found is None else window[begin : begin + 1] + (found.group(1) or b"")


_Place = tuple["_Place", str | int] | None
"""Where a value stands: where what holds it does, and its name or number there."""


def _found(value: Any) -> Iterator[tuple[_Place, str, Any]]:
    """Patterns, and numbers that count, by the names under which they stand; between them whatever else there
    is, without a name."""
    left: list[Iterator[tuple[_Place, str, Any]]] = [iter([(None, "", value)])]
    while left:
        try:
            place, name, value = next(left[-1])
        except StopIteration:
            left.pop()
            continue
        if not _matters(name, value):
            yield place, "", None
        elif isinstance(value, dict):
            yield place, "", None
            if name == "patternProperties":
                yield from (((place, key), "pattern", key) for key in value)
            left.append(_named(place, value))
        elif isinstance(value, list):
            yield place, "", None
            left.append(_numbered(place, value))
        elif name in _JSON:
            with suppress(BadRequestError):
                schema = value_of(name, value.encode(errors="surrogatepass"))
                left.append(iter([(place, "", schema)]))
        elif name == _MULTIPLE:
            yield place, name, _digits(value)
        elif name in _TEXTS:
            yield place, name, value
            if name in _GRAMMARS:
                for schema in _schemas(value):
                    yield place, _NO_SCHEMA if schema is None else "", None
                    left.append(iter([(place, "", schema)]))
        elif value > 0:
            yield place, name, int(min(MOST, value))


def _named(place: _Place, values: Mapping[str, Any]) -> Iterator[tuple[_Place, str, Any]]:
    return (((place, name), name, item) for name, item in values.items())


def _numbered(place: _Place, values: Sequence[Any]) -> Iterator[tuple[_Place, str, Any]]:
    return (((place, at), "", item) for at, item in enumerate(values))


def _schemas(grammar: str) -> Iterator[Any]:
    """Those that a grammar of Lark's has within it; None for what is no JSON."""
    at = 0
    while (found := _SCHEMA_WITHIN.search(grammar, at)) is not None:
        schema, at = None, found.end()
        with suppress(ValueError, RecursionError):
            schema, at = _JSON_AT(grammar, at)
        yield schema


def _matters(name: str, item: Any) -> bool:
    """Whether something is to be looked at, or into."""
    if isinstance(item, str):
        return name in _TEXTS or name in _JSON
    if isinstance(item, int | float):
        return (name in _ITEMS or name == _MULTIPLE) and abs(item) < math.inf
    return isinstance(item, dict | list)


def _digits(number: float) -> int:
    """A number without its sign and its power of ten: engines keep those apart."""
    if abs(number) > MOST:
        return MOST
    digits = f"{abs(number):.15e}".partition("e")[0].replace(".", "").rstrip("0")
    return int(digits or 1)


def _where(field: str, place: _Place) -> str:
    return field + _path(place)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"


def _path(place: _Place) -> str:
    names: list[str] = []
    while place is not None:
        place, name = place
        names.append(f"[{name}]" if isinstance(name, int) else f".{name[:_LONGEST_SHOWN]}")
    return "".join(reversed(names[:_LEVELS]))
