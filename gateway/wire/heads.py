"""Heads of requests and answers (RFC 9112, sections 2 to 6). Strict: what two parsers might read in two
ways is refused, since one of them would be tricked by it.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gateway.errors import MalformedRequestError

LONGEST_HEAD_BYTES = 64 << 10
MOST_HEADERS = 128
END = b"\r\n\r\n"
CHUNKED = -1
"""A body's length when it comes in chunks."""
UNTIL_CLOSE = -2
"""An answer's length when the end of the connection ends it."""

_CONTROLS = bytes(set(range(32)) - set(b"\r\n\t")) + b"\x7f"
_TOKEN = (string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~").encode()
_ONLY_ONCE = frozenset(
    ("authorization", "content-length", "content-type", "expect", "host", "transfer-encoding", "x-api-key")
)
_SPACED = re.compile(rb"\r\n(?:content-length|transfer-encoding)[ \t]+:")
_CARRIED = (
    "metadata",
    "endpoint-load-metrics",
    "x-amzn-sagemaker-new-session-id",
    "x-amzn-sagemaker-closed-session-id",
)
"""Headers of an answer that are the client's: what the numbers of a binary answer are, the engine's load for
who asked for it, and the session that has begun or ended."""
_LONGEST_LENGTH = 18
"""Digits of a content-length."""


@dataclass(slots=True)
class RequestHead:
    """``length`` is the body's in bytes, or CHUNKED. Header names are in lower case."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    length: int
    keep_alive: bool
    http_1_0: bool = False
    waits_for_continue: bool = False
    memo: Any = None
    """What was found out about these headers. A connection whose next request has the same ones, but for the
    length, is given this same head again."""


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """``length`` is the body's in bytes, CHUNKED, or UNTIL_CLOSE."""

    status: int
    raw: bytes
    length: int
    keep_alive: bool
    content_type: bytes = b""
    """In lower case, parameters included."""
    is_json: bool = True
    """Also where the engine does not say what it sends."""
    is_stream: bool = False
    """Of server-sent events."""
    carried: bytes = b""
    """The header lines that belong to the client's answer, each with its line end."""

    def get(self, name: str) -> str | None:
        """A header's value, of several the first; ``name`` is in lower case."""
        return _first(self.raw, self.raw.lower(), name)


def parse_request(head: bytes) -> RequestHead:
    """A request's head without the empty line at its end. Raises MalformedRequestError."""
    first, headers = _split(head)
    parts = first.split(" ")
    if len(parts) != 3 or not parts[0] or not parts[1]:
        raise MalformedRequestError(f"The request line {first[:80]!r} is not `METHOD target HTTP/1.1`.")
    method, target, version = parts
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        raise MalformedRequestError(f"The version {version[:20]!r} is not HTTP/1.1.", status=505)
    if method.encode("latin-1").translate(None, _TOKEN):
        raise MalformedRequestError(f"The method {method[:40]!r} is not a word.")
    path, _, query = target.partition("?")
    if not path.startswith("/"):
        path = _path_of(path)
    old = version == "HTTP/1.0"
    if "host" not in headers and not old:
        raise MalformedRequestError("host: is missing; HTTP/1.1 needs this header.")
    length = _request_length(headers, old)
    tokens = headers.get("connection")
    keep_alive = not old if tokens is None else _keeps_alive(tokens, default=not old)
    expects = headers.get("expect")
    if expects is not None and expects.lower() != "100-continue":
        raise MalformedRequestError(f"expect: {expects[:40]!r} is not 100-continue; leave it out", status=417)
    return RequestHead(method, path, query, headers, length, keep_alive, old, expects is not None and not old)


@lru_cache(maxsize=256)  # within a second, an engine's answers mostly begin alike
def parse_answer(head: bytes) -> AnswerHead:
    """An answer's head without the empty line at its end. Raises ValueError.

    Of its headers only those are looked for that decide how the answer is read.
    """
    if not (head.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")) and head[9:12].isdigit()):
        raise ValueError(f"the status line {head[:80]!r} is not HTTP/1.1")
    if head[12:13] not in (b"", b" ", b"\r"):
        raise ValueError(f"the status line {head[:80]!r} has no status of three digits")
    status = int(head[9:12])
    if status < 100:
        raise ValueError(f"the status {status} is not one")
    low = head.lower() + b"\r\n"
    if b"\r\n " in low or b"\r\n\t" in low or low.count(b"\n") != low.count(b"\r\n"):
        raise ValueError("its head has folded lines or bare line ends")
    connection = _header(low, b"\r\nconnection:")
    current = head[7:8] == b"1"
    keep_alive = current if connection is None else _keeps_alive(connection, default=current)
    if status >= 500:
        # Servers close behind an answer to what broke in them (uvicorn does), and do not say so: the next
        # request would be sent into that.
        keep_alive = False
    coding, given = _header(low, b"\r\ntransfer-encoding:"), _header(low, b"\r\ncontent-length:")
    if status < 200 or status in (204, 304):
        length = 0
    elif coding is not None:
        if coding != "chunked" or given is not None:
            raise ValueError(f"the body is framed by {coding[:40]!r} and content-length {given!r}")
        length = CHUNKED
    elif given is not None:
        if not _is_length(given):
            raise ValueError(f"content-length {given[:40]!r} is no length")
        length = int(given)
    else:
        if _SPACED.search(low):
            raise ValueError("there is a space before the colon of the header that says how long the body is")
        length, keep_alive = UNTIL_CLOSE, False
    kind = (_first(low, low, "content-type") or "").encode("latin-1")
    media = kind.partition(b";")[0].strip()
    is_json, is_stream = media in (b"", b"application/json"), media == b"text/event-stream"
    return AnswerHead(status, head, length, keep_alive, kind, is_json, is_stream, _carried(head, low))


def _carried(head: bytes, low: bytes) -> bytes:
    found = {name: value for name in _CARRIED if (value := _first(head, low, name)) is not None}
    return "".join(f"{name}: {value}\r\n" for name, value in found.items()).encode("latin-1")


def _first(raw: bytes, low: bytes, name: str) -> str | None:
    """A header's value in a head, which ``low`` is in lower case; of several the first."""
    place = low.find(b"\r\n%b:" % name.encode())
    if place < 0:
        return None
    at = place + len(name) + 3
    end = raw.find(b"\r\n", at)
    return raw[at : end if end >= 0 else None].strip(b" \t").decode("latin-1")


def _header(low: bytes, name: bytes) -> str | None:
    """A header's value in a head in lower case. Raises ValueError when it comes twice."""
    at = low.find(name)
    if at < 0:
        return None
    at += len(name)
    if low.find(name, at) >= 0:
        raise ValueError(f"the header {name[2:-1].decode()} comes twice")
    return low[at : low.find(b"\r\n", at)].strip(b" \t").decode("latin-1")


def _split(head: bytes) -> tuple[str, dict[str, str]]:
    """First line and headers. Values of a header that comes twice are joined with commas."""
    text = head.decode("latin-1")
    first, *lines = text.split("\r\n")
    if head.translate(None, _CONTROLS) != head or not head.count(b"\r") == head.count(b"\n") == len(lines):
        raise MalformedRequestError("The head has control characters or bare line ends; send text and CRLF.")
    if len(lines) > MOST_HEADERS:
        raise MalformedRequestError(
            f"There are {len(lines)} headers; send at most {MOST_HEADERS}.", status=431
        )
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name = name.lower()
        value = value.strip(" \t")
        if not colon or not name:
            raise MalformedRequestError(f"The header line {line[:40]!r} is not `name: value`.")
        if name in headers:
            if name in _ONLY_ONCE:
                raise MalformedRequestError(f"{name}: comes twice; send it once.")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    if "".join(headers).encode("latin-1").translate(None, _TOKEN):
        raise MalformedRequestError("A header's name has characters that no name may have.")
    return first, headers


def has_controls(line: bytes) -> bool:
    """Whether there are control characters other than a tab in one line, line ends included."""
    return len(line.translate(None, _CONTROLS + b"\r\n")) != len(line)


def refuse_bad_trailers(lines: bytes) -> None:
    """Raise ValueError where trailers, without the empty line at their end, are not as headers are to be."""
    try:
        _split(b"\r\n" + lines)
    except MalformedRequestError as error:
        raise ValueError(f"its trailers are no headers: {str(error).removesuffix('.')}") from None


def _request_length(headers: dict[str, str], old: bool) -> int:
    coding, given = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if given is not None:
            raise MalformedRequestError("content-length: and transfer-encoding: contradict; send one.")
        if old:
            raise MalformedRequestError("transfer-encoding: does not exist in HTTP/1.0; send content-length.")
        if coding.lower() != "chunked":
            raise MalformedRequestError(
                f"transfer-encoding: {coding[:40]!r} is not known; send `chunked`.", status=501
            )
        return CHUNKED
    if given is None:
        return 0
    if not _is_length(given):
        raise MalformedRequestError(f"content-length: {given[:40]!r} is no length; send a whole number.")
    return int(given)


def _is_length(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _LONGEST_LENGTH


def _keeps_alive(connection: str, *, default: bool) -> bool:
    words = [word.strip().lower() for word in connection.split(",")]
    return "close" not in words and (default or "keep-alive" in words)


def _path_of(target: str) -> str:
    """The path of an absolute target, as proxies are sent it; ``*`` stays."""
    scheme, found, rest = target.partition("://")
    if found and scheme.lower() in ("http", "https"):
        return "/" + rest.partition("/")[2]
    if target == "*":
        return target
    raise MalformedRequestError(f"The target {target[:80]!r} is no path; it begins with `/`.")
