"""Whether a text is JSON that a client's schema allows.

Schemas are hostile: one may name another by its address, or hold a pattern that takes for ever. Nothing is
fetched here, patterns are matched in linear time, and a schema that is too long, too deep or not understood
says nothing about an answer.

A small one may still take 2 ** 60 steps, and then only the end of the process ends it. So which schema is
looked at is told before (``begins``), and one over which a process was lost is not looked at again
(:class:`Deadly`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import jsonschema_rs
import msgspec

LONGEST = 100_000
"""Bytes of a schema."""
DEEPEST = 100
"""Levels of a schema."""
KEPT = 256
"""Compiled schemas."""
DEADLY_KEPT = 1024
"""Schemas that are remembered because a process was lost over them."""
DEADLY_OF_A_TENANT = 8
"""After so many of them no schema of that tenant is looked at, until others have pushed them out."""
_PATTERNS = jsonschema_rs.RegexOptions(size_limit=1 << 20, dfa_size_limit=1 << 20)
"""The engine that matches in linear time, and the bytes that a compiled pattern may take."""
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"')
_BRACKETS = re.compile(rb"[{}\[\]]")


class UncheckedError(Exception):
    """A process was lost over this schema, or over many of this tenant."""


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """A schema of a tenant, by hashes: neither says what it is the hash of."""

    tenant: bytes
    schema: bytes


NONE = Mark(b"", b"")
"""No schema is looked at any more."""


class Deadly:
    """Schemas over which processes were lost, those last that were so last."""

    def __init__(self, marks: Iterable[Mark] = ()) -> None:
        self.marks: OrderedDict[Mark, None] = OrderedDict()
        self._of: dict[bytes, int] = {}
        for mark in marks:
            self.add(mark)

    def add(self, mark: Mark) -> None:
        if mark in self.marks:
            self.marks.move_to_end(mark)
            return
        self.marks[mark] = None
        self._of[mark.tenant] = self._of.get(mark.tenant, 0) + 1
        if len(self.marks) > DEADLY_KEPT:
            gone, _ = self.marks.popitem(last=False)
            self._of[gone.tenant] -= 1
            if not self._of[gone.tenant]:
                del self._of[gone.tenant]

    def __contains__(self, mark: Mark) -> bool:
        return mark in self.marks or self._of.get(mark.tenant, 0) >= DEADLY_OF_A_TENANT


class Schemas:
    """Compiled schemas by their hashes; those that were used last are kept.

    ``begins`` is told which one is about to be looked at, and then of ``NONE``; ``tenant`` is whose the
    present one is; those in ``deadly`` are not looked at.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self.begins: Callable[[Mark], None] = lambda mark: None
        self.tenant = ""
        self.deadly = Deadly()
        self._compiled: OrderedDict[bytes, jsonschema_rs.Draft202012Validator | None] = OrderedDict()

    def allows(self, text: str, schema: Any) -> bool:
        """Whether ``text`` is JSON, and ``schema`` says nothing against it. Raises UncheckedError."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        try:
            validator = self._validator(schema)
            if validator is None:
                return True  # the client's own mistake says nothing about the answer
            return validator.is_valid(value)
        except (ValueError, RecursionError):
            return True  # half a surrogate pair, or nested too deeply: JSON that it cannot look at
        finally:
            self.begins(NONE)

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
        mark = Mark(hashlib.sha256(self.tenant.encode()).digest(), key)
        if mark in self.deadly:
            raise UncheckedError
        self.begins(mark)
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
