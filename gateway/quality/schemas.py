"""Whether a text is JSON that a client's schema allows.

Schemas are hostile: one may name another by its address, or hold a pattern that takes for ever. Nothing is
fetched here, patterns are matched in linear time, and a schema that is too long, too deep or not understood
says nothing about an answer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from typing import Any

import jsonschema_rs
import msgspec

LONGEST = 100_000
"""Bytes of a schema."""
DEEPEST = 100
"""Levels of a schema."""
KEPT = 256
"""Compiled schemas."""
_PATTERNS = jsonschema_rs.RegexOptions(size_limit=1 << 20, dfa_size_limit=1 << 20)
"""The engine that matches in linear time, and the bytes that a compiled pattern may take."""
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"')
_BRACKETS = re.compile(rb"[{}\[\]]")


class Schemas:
    """Compiled schemas by their hashes; those that were used last are kept."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._compiled: OrderedDict[bytes, jsonschema_rs.Draft202012Validator | None] = OrderedDict()

    def allows(self, text: str, schema: Any) -> bool:
        """Whether ``text`` is JSON, and ``schema`` says nothing against it."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        validator = self._validator(schema)
        if validator is None:
            return True  # the client's own mistake says nothing about the answer
        try:
            return validator.is_valid(value)
        except (ValueError, RecursionError):
            return True  # half a surrogate pair, or nested too deeply: JSON that it cannot look at

    def _validator(self, schema: Any) -> jsonschema_rs.Draft202012Validator | None:
        if not isinstance(schema, dict):
            return None
        try:
            raw = msgspec.json.encode(schema)
        except (msgspec.MsgspecError, RecursionError, ValueError, TypeError):
            return None
        if len(raw) > LONGEST:
            return None
        key = hashlib.sha256(raw).digest()
        if key in self._compiled:
            self._compiled.move_to_end(key)
            return self._compiled[key]
        made = self._compiled[key] = None if _deeper(raw, DEEPEST) else _compile(schema)
        if len(self._compiled) > self._kept:
            self._compiled.popitem(last=False)
        return made


def _compile(schema: dict[str, Any]) -> jsonschema_rs.Draft202012Validator | None:
    """Of the drafts always the same one, whatever the schema says of itself; None where it cannot be."""
    try:
        return jsonschema_rs.Draft202012Validator(schema, pattern_options=_PATTERNS, offline=True)
    except (ValueError, RecursionError, jsonschema_rs.ReferencingError):
        return None


def _deeper(raw: bytes, most: int) -> bool:
    """Whether a JSON text has more than so many levels."""
    level = 0
    for bracket in _BRACKETS.findall(_STRINGS.sub(b"", raw)):
        level += 1 if bracket in b"{[" else -1
        if level > most:
            return True
    return False
