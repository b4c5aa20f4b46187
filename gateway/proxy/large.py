"""Bodies that take long to read: of megabytes, compressed, or nearly nothing but structure.

They are read in turns with whatever else the event loop has to do (``in_turns``), or in a thread where the
interpreter is not needed for it. What comes of it is a ``Body`` like any other.
"""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import Awaitable, Mapping, Sequence
from copy import copy
from time import perf_counter

import msgspec

from gateway.errors import BadRequestError
from gateway.proxy.body import (
    LARGEST_LENIENT_BYTES,
    LARGEST_READ_BYTES,
    NEEDED,
    TOO_DEEP,
    Body,
    Reads,
    fields_of,
)
from gateway.proxy.coercions import kind_of_json
from gateway.proxy.fields import GRAMMAR_FIELDS, RequestFields
from gateway.proxy.scan import (
    MOST_FIELDS,
    WINDOW,
    Found,
    NotJsonError,
    Steps,
    T,
    TooDeepError,
    TooManyFieldsError,
    count_items,
    first_level,
)
from gateway.wire.encodings import decoded
from gateway.wire.requests import WHOLE_BYTES, Received

SMALL_BYTES = LARGEST_LENIENT_BYTES
"""A body of up to this is read at once, whatever is in it."""
TURN_S = 0.00025
"""How long one turn takes, and a step more."""
_AT_ONCE_NS = 500_000
_NS_OF_BYTE, _NS_OF_MARK = 0.5, 5
"""What reading takes at once, a byte that is skipped and one that means something: on the slow side."""
_MARKS = (b"\\", b'"', b"[", b"{")
MOST_PROMPTS = 1 << 16


def quickly_read(raw: bytes) -> bool:
    """Whether it can be read at once, without others having to wait for that."""
    size = len(raw)
    if size <= SMALL_BYTES:
        return True
    return size <= WHOLE_BYTES and (
        _NS_OF_BYTE * size + _NS_OF_MARK * sum(map(raw.count, _MARKS)) <= _AT_ONCE_NS
    )


class LargeReader:
    """Reads bodies, those of all requests in turns with each other."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def read(self, received: Received, coding: str, limit: int, reads: Reads) -> Body:
        """``coding``: its content-encoding; ``limit``: bytes that it may have without it. Raises GatewayError
        for what is no such body."""
        raw = received
        if not isinstance(raw, bytes):
            raw = await asyncio.to_thread(b"".join, raw)
        if coding:
            raw = await asyncio.to_thread(decoded, raw, coding, limit)
        if quickly_read(raw):
            try:
                return Body(raw, reads)
            except BadRequestError:
                if len(raw) <= SMALL_BYTES:
                    raise
        coding = json.detect_encoding(raw[:4])
        parts = await self.in_turns(_in_utf8(raw, coding))
        if parts:
            raw = await asyncio.to_thread(b"".join, parts)
        try:
            found = await self.in_turns(first_level(raw))
            body = LargeBody(raw, found, reads)
            span = found.fields.get("prompt")
            if span is not None:
                body.prompts = await self.in_turns(_prompts(raw, span[0]))
        except NotJsonError as error:
            begin = raw[:WINDOW].lstrip()
            if begin[:1] not in (b"{", b""):
                raise BadRequestError(f"The body is {kind_of_json(begin)}; send a JSON object.") from None
            raise BadRequestError(
                f"The body is not valid JSON ({error}); send a JSON object as RFC 8259 has it."
            ) from None
        except TooDeepError:
            raise BadRequestError(TOO_DEEP) from None
        except TooManyFieldsError:
            raise BadRequestError(
                f"The body has more than {MOST_FIELDS} fields at its first level; send fewer"
            ) from None
        return body

    def begin(self, steps: Steps[None]) -> Awaitable[None] | None:
        """Have them done: at once what fits one turn, the rest by what is returned."""
        until = perf_counter() + TURN_S
        try:
            while perf_counter() < until:
                next(steps)
        except StopIteration:
            return None
        return self.in_turns(steps)

    async def in_turns(self, steps: Steps[T]) -> T:
        """What comes of ``steps``. Of all that go on at once, one has a turn each time that the loop has
        looked after everything else."""
        while True:
            async with self._turn:
                until = perf_counter() + TURN_S
                try:
                    next(steps)
                    while perf_counter() < until:
                        next(steps)
                except StopIteration as end:
                    found: T = end.value
                    return found
                await asyncio.sleep(0)


class LargeBody(Body):
    """A body of which only the places of its fields are known."""

    __slots__ = ("_empty", "_ours", "_whole")

    def __init__(self, raw: bytes, found: Found, reads: Reads) -> None:
        """Raises BadRequestError for a field that is needed here and that vLLM could not read either."""
        view = memoryview(raw)
        self._raw = raw
        self._whole = view[: found.close]
        """All but the brace that ends it, and what follows that."""
        self._empty = not found.fields
        self._ours = b""
        self._values = {}
        self._known = self._all = {
            name: msgspec.Raw(view[begin:end]) for name, (begin, end) in found.fields.items()
        }
        self.prompts = None
        self.fields = self._needed(reads)

    def _needed(self, reads: Reads) -> RequestFields:
        small = [
            name for name in RequestFields.__struct_fields__ if len(self.view(name)) <= LARGEST_READ_BYTES
        ]
        if any(name not in small for name in NEEDED):
            return self._read(reads)
        return Body(self.only(small), reads).fields

    @property
    def json(self) -> bytes:
        return self.with_fields(b"") if self._ours else self._raw

    def grammars(self) -> Sequence[tuple[str, msgspec.Raw]]:
        return [(name, raw) for name in GRAMMAR_FIELDS if (raw := self._fields.get(name)) is not None]

    def changed(self, changes: Mapping[str, bytes], reads: Reads) -> LargeBody:
        other = copy(self)
        other._ours = self._ours + fields_of(changes)
        other._known = other._all = self._fields | {
            name: msgspec.Raw(value) for name, value in changes.items()
        }
        other._values = {}
        return other

    def only(self, names: Sequence[str]) -> bytes:
        return b"{%b}" % fields_of({name: self.raw(name) for name in names if name in self})[1:]

    def with_fields(self, ours: bytes) -> bytes:
        return b"".join(self.parts(ours))

    def parts(self, ours: bytes) -> tuple[memoryview, bytes]:
        added = self._ours + ours
        return self._whole, (added[1:] if self._empty else added) + b"}"


def _prompts(raw: bytes, begin: int) -> Steps[int]:
    """A text is one prompt, a list of token ids too; a list of either is many."""
    if raw[begin : begin + 1] != b"[":
        return 1
    first = raw[begin + 1 : begin + WINDOW].lstrip(b" \t\r\n")[:1]
    return (yield from count_items(raw, begin, MOST_PROMPTS)) if first in (b'"', b"[") else 1


def _in_utf8(raw: bytes, coding: str) -> Steps[list[bytes]]:
    """Parts of the same in UTF-8 and without a byte order mark; none where it is that already. Raises
    BadRequestError for what is no text."""
    decoder = codecs.getincrementaldecoder(coding)("surrogatepass")
    parts: list[bytes] = []
    try:
        for at in range(0, len(raw), WINDOW):
            text = decoder.decode(raw[at : at + WINDOW], at + WINDOW >= len(raw))
            if coding != "utf-8":
                parts.append(text.encode("utf-8", "surrogatepass"))
            yield
    except UnicodeError as error:
        raise BadRequestError(f"The body is not valid JSON ({error}); send it in UTF-8.") from None
    return parts
