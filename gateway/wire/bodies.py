"""Bodies as they come: by length, in chunks, or until the connection ends (RFC 9112, section 7)."""

from __future__ import annotations

from typing import Protocol

from gateway.wire.heads import CHUNKED, UNTIL_CLOSE, has_controls, refuse_bad_trailers

LAST_CHUNK = b"0\r\n\r\n"
_LONGEST_SIZE_LINE = 256
_LONGEST_TRAILERS = 8192
_HEX = b"0123456789abcdefABCDEF"
SIZES = {b"%x" % size: size for size in range(1, 4096)}
"""The usual sizes of a stream's chunks, by how they are written."""


class Body(Protocol):
    done: bool
    """The whole body has come."""

    between: bool
    """What comes next is a chunk's beginning."""
    rest: bytes
    """What came after it."""

    def feed(self, data: bytes) -> bytes:
        """The part of the body in ``data``. Raises ValueError for what is no such body."""
        ...


def body_of(length: int) -> Body:
    """The reader of a body of ``length`` bytes, CHUNKED, or UNTIL_CLOSE."""
    if length == CHUNKED:
        return ChunkedBody()
    return EndlessBody() if length == UNTIL_CLOSE else LengthBody(length)


class LengthBody:
    __slots__ = ("_missing", "between", "done", "rest")

    def __init__(self, length: int) -> None:
        self.between = False
        self._missing = length
        self.done = not length
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        missing = self._missing
        if len(data) < missing:
            self._missing = missing - len(data)
            return data
        self.done = True
        self._missing = 0
        if len(data) == missing:
            return data
        self.rest = data[missing:]
        return data[:missing]


class EndlessBody:
    """It ends with the connection, which its owner sees."""

    __slots__ = ("between", "done", "rest")

    def __init__(self) -> None:
        self.between = False
        self.done = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        return data


class ChunkedBody:
    __slots__ = ("_ended", "_in_trailers", "_missing", "_pending", "between", "done", "rest")

    def __init__(self) -> None:
        self.between = True
        self._missing = 0
        """Bytes of the present chunk that are still to come."""
        self._ended = False
        """The present chunk's bytes are all here; its line end comes next."""
        self._pending = b""
        """The beginning of a size line, of a line end, or of the trailers."""
        self._in_trailers = False
        self.done = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        if self._pending:
            data = self._pending + data
            self._pending = b""
        parts = []
        at, end = 0, len(data)
        while self.between and at < end:
            # Nearly always: whole chunks.
            line_end = data.find(b"\r\n", at, at + 16)
            size = SIZES.get(data[at:line_end])
            if line_end < 0 or size is None or not data.startswith(b"\r\n", line_end + 2 + size):
                break
            at = line_end + 4 + size
            parts.append(data[line_end + 2 : at - 2])
        while at < end and not self.done:
            if missing := self._missing:
                part = data[at : at + missing]
                parts.append(part)
                at += len(part)
                self._missing = missing - len(part)
                self._ended = not self._missing
            elif self._ended:
                at = self._end_chunk(data, at)
            elif self._in_trailers:
                at = self._skip_trailers(data, at)
            else:
                at = self._read_size(data, at)
        if self.done:
            self.rest = data[at:]
        self.between = not (self._missing or self._ended or self._pending or self._in_trailers or self.done)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _end_chunk(self, data: bytes, at: int) -> int:
        if len(data) - at < 2:
            self._pending = data[at:]
            return len(data)
        if not data.startswith(b"\r\n", at):
            raise ValueError("a chunk is longer than it says")
        self._ended = False
        return at + 2

    def _read_size(self, data: bytes, at: int) -> int:
        line_end = data.find(b"\r\n", at, at + _LONGEST_SIZE_LINE)
        if line_end < 0:
            if len(data) - at >= _LONGEST_SIZE_LINE:
                raise ValueError("the size of a chunk never ends")
            self._pending = data[at:]
            return len(data)
        line = data[at:line_end]
        digits = line.split(b";", 1)[0].rstrip(b" \t")
        if has_controls(line):
            raise ValueError("the size of a chunk, or what follows it, has control characters")
        if not 0 < len(digits) <= 15 or digits.translate(None, _HEX):
            raise ValueError(f"the size of a chunk is {digits[:20]!r}")
        size = int(digits, 16)
        if size:
            self._missing = size
        else:
            self._in_trailers = True
        return line_end + 2

    def _skip_trailers(self, data: bytes, at: int) -> int:
        """Trailers are held to the rules of heads, and read over: nobody here has a use for them."""
        if data.startswith(b"\r\n", at):
            self.done = True
            return at + 2
        trailers_end = data.find(b"\r\n\r\n", at, at + _LONGEST_TRAILERS + 4)
        if trailers_end >= 0:
            refuse_bad_trailers(data[at:trailers_end])
            self.done = True
            return trailers_end + 4
        if len(data) - at > _LONGEST_TRAILERS:
            raise ValueError("the trailers never end")
        self._pending = data[at:]
        return len(data)


def chunk(payload: bytes) -> bytes:
    """``payload`` as one chunk; it must not be empty."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)
