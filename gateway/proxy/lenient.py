"""JSON in other encodings than UTF-8, as Python's parser takes it."""

from __future__ import annotations

import json


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
