"""JSON that Python reads and a strict parser does not: other encodings, and escapes of half a character."""

from __future__ import annotations

import json
import re

_LONE_SURROGATE = re.compile(
    rb"\\u[dD](?<!\\\\u[dD])(?:[89abAB]..(?!\\u[dD][c-fC-F])|[c-fC-F]..(?<!\\u[dD][89abAB]..\\u....))",
    re.DOTALL,
)


def in_utf8(raw: bytes) -> bytes | None:
    """The same in UTF-8 and without a byte order mark, where ``json`` would take it for JSON in another
    encoding; else None."""
    coding = json.detect_encoding(raw)
    if coding == "utf-8":
        return None
    try:
        return raw.decode(coding, "surrogatepass").encode("utf-8", "surrogatepass")
    except UnicodeError:
        return None


def without_lone_surrogates(raw: bytes) -> bytes:
    """The same with U+FFFD instead of the halves of characters that JavaScript writes when a text was cut
    within one. In linear time, and no object is made of it."""
    return _LONE_SURROGATE.sub(rb"\\ufffd", raw)
