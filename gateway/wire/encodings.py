"""Bodies of requests that come compressed (RFC 9110, section 8.4): gzip, deflate, zstd.

Bounded while decoding: a few kilobytes can stand for gigabytes, and what is over the limit is never made.
"""

from __future__ import annotations

import io
import zlib
from typing import BinaryIO, cast

import zstandard

from gateway.errors import BadRequestError, BodyTooLargeError, UnsupportedCodingError

CODINGS = ("gzip", "deflate", "zstd", "identity")
_GZIP, _ZLIB, _RAW = 31, 15, -15
"""Window bits, as zlib tells the three formats apart."""
MOST_MEMBERS = 1024
"""A body may be made of several; bgzip begins one every 64 kB. An empty one has 9 bytes, or 20."""
_TOO_MANY = f"it has more than {MOST_MEMBERS} members"
_WINDOW = 64 << 10
"""Bytes that a decoder is given at once: it copies what of them is left at the end of a member."""
_SMALLEST_WINDOW = 8 << 20
"""Of a zstd frame, what RFC 8878 asks every decoder to take."""


def decoded(body: bytes, coding: str, limit: int) -> bytes:
    """The body without its coding, the value of ``content-encoding``. ``limit``: bytes of the result.

    Raises UnsupportedCodingError for a coding that is not known, BodyTooLargeError when the result would be
    larger than ``limit``, and BadRequestError for what is not in this coding, or is cut off.
    """
    names = [name for part in coding.split(",") if (name := part.strip().lower()) not in ("", "identity")]
    if not names:
        return body
    if len(names) > 1 or names[0].removeprefix("x-") not in CODINGS:
        raise UnsupportedCodingError(
            f"content-encoding: {coding[:80]!r} is not known; use one of {', '.join(CODINGS)}",
            param="content-encoding",
            internal="content-encoding: is not known",
        )
    name = names[0].removeprefix("x-")
    try:
        if name == "zstd":
            return _zstd(body, limit)
        if name == "gzip":
            return _inflated(body, _GZIP, limit)
        return _inflated(body, _ZLIB if _is_zlib(body) else _RAW, limit)
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        raise BadRequestError(
            f"The body is not {name} ({error}); send it so, or leave content-encoding out.",
            param="content-encoding",
        ) from None


def _is_zlib(body: bytes) -> bool:
    """``deflate`` is zlib's format (RFC 1950), but some send the bare one, and every server takes both."""
    return len(body) >= 2 and body[0] & 0x0F == 8 and int.from_bytes(body[:2], "big") % 31 == 0


def _inflated(body: bytes, window_bits: int, limit: int) -> bytes:
    rest, found, size = memoryview(body), io.BytesIO(), 0
    for _ in range(MOST_MEMBERS):
        decoder = zlib.decompressobj(window_bits)
        while not decoder.eof:
            window, rest = rest[:_WINDOW], rest[_WINDOW:]
            if not window:
                raise EOFError("it is cut off")
            part = decoder.decompress(window, limit - size + 1)
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            found.write(part)
        rest = memoryview(body)[len(body) - len(rest) - len(decoder.unused_data) :]
        if not rest:
            return found.getvalue()
        if window_bits != _GZIP:
            raise EOFError("something follows its end")
    raise EOFError(_TOO_MANY)


def _zstd(body: bytes, limit: int) -> bytes:
    frames = _Frames(body, limit)
    reader = _zstd_decoder(limit).stream_reader(cast(BinaryIO, frames), _WINDOW, read_across_frames=True)
    found = reader.read(limit + 1)
    if len(found) > limit:
        raise _too_large(limit)
    if not frames.whole:
        raise EOFError("it is cut off")
    return found


class _Frames:
    """A body as its reader takes it, in windows. That reader can be bounded, and does not say where a frame
    ends: so each window that it has read, which is known by then not to hold too much, is read once more."""

    def __init__(self, body: bytes, limit: int) -> None:
        self._rest = memoryview(body)
        self._window = self._rest[:0]
        self._decoder = _zstd_decoder(limit)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._count = 0

    @property
    def whole(self) -> bool:
        """Whether what has been read ends where a frame does."""
        return self._frame is not None and self._frame.eof

    def read(self, size: int) -> memoryview:
        """The next window; none at the end. Raises EOFError and ZstdError for what is wrong with the last."""
        window = self._window
        while window:
            if self._frame is None or self._frame.eof:
                self._count += 1
                if self._count > MOST_MEMBERS:
                    raise EOFError(_TOO_MANY)
                self._frame = self._decoder.decompressobj()
            self._frame.decompress(window)
            window = window[len(window) - len(self._frame.unused_data) :]
        self._window, self._rest = self._rest[:size], self._rest[size:]
        return self._window


def _zstd_decoder(limit: int) -> zstandard.ZstdDecompressor:
    return zstandard.ZstdDecompressor(max_window_size=max(limit, _SMALLEST_WINDOW))


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(
        f"The decoded body is larger than the limit of {limit} bytes (gateway.max_body_bytes); send less "
        "context, or have the limit raised."
    )
