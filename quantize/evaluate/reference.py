"""What is kept of a reference, so that variants can be compared with it exactly: one compact file.

An engine with our route gives the final hidden states of the scored tokens, n x width numbers of 16 bits,
from which any engine with the same head computes the whole vocabulary's log-probabilities again (1,152 bytes
a token for a model of width 576, where those of 49,152 tokens would take 196,608). A stock server gives the
likeliest tokens of each place.

The file is a sequence of records, each on disk before the next: lengths, a line of JSON that says whose it
is and of which tokens, the data. A process that was killed leaves whole records and at most one torn one,
which is cut off.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantize.core.files import append_whole

_LENGTHS = struct.Struct("<4sIQ")
_MAGIC = b"TRF1"


@dataclass(frozen=True)
class Kept:
    """Of one conversation: ``hidden`` states, or the ``likeliest`` tokens, of the n scored tokens."""

    kind: Literal["hidden", "likeliest"]
    about: Mapping[str, Any]
    """``hidden``: ``width``, ``dtype`` and ``head`` (the fingerprint that a variant's must equal).
    ``likeliest``: ``width``, and ``top``, how many of a row's ids are its likeliest."""
    data: bytes
    """``hidden``: (n, width) of ``dtype``. ``likeliest``: (n, width) int32 ids, then as many float64
    log-probabilities."""

    @property
    def digest(self) -> str:
        """What a variant's figures name as what they are compared with."""
        about = json.dumps([self.kind, dict(self.about)], sort_keys=True).encode()
        return hashlib.sha256(about + b"\n" + self.data).hexdigest()[:16]


@dataclass(frozen=True)
class _Place:
    at: int
    size: int
    line: Mapping[str, Any]


class ReferenceFile:
    """Records by role and place in its list of items. For one writer, and readers after it."""

    def __init__(self, path: Path) -> None:
        """Find what is there, reading the file; a record that is not whole, and what is after it, is not."""
        self.path = path
        self._places: dict[tuple[str, int], _Place] = {}
        self._end = 0
        if path.exists():
            self._scan()

    def digest(self, role: str, index: int) -> str | None:
        """Digest of a record, or None where there is none."""
        place = self._places.get((role, index))
        return str(place.line["digest"]) if place else None

    def tokens_sha256(self, role: str, index: int) -> str | None:
        """:func:`span_sha256` of the tokens that a record is of."""
        place = self._places.get((role, index))
        return str(place.line["tokens"]) if place else None

    def span(self, role: str, index: int) -> tuple[list[int], int] | None:
        """Those tokens, and where the scored ones begin; None where there is no record, or it is of a version
        that kept their digest alone."""
        place = self._places.get((role, index))
        if place is None or "ids" not in place.line:
            return None
        return [int(token) for token in place.line["ids"]], int(place.line["start"])

    def read(self, role: str, index: int) -> Kept:
        """One record. Raises KeyError where there is none."""
        place = self._places[role, index]
        with self.path.open("rb") as file:
            file.seek(place.at)
            return Kept(place.line["kind"], place.line["about"], file.read(place.size))

    def append(self, role: str, index: int, tokens: Sequence[int], start: int, kept: Kept) -> None:
        """Keep a record; when this returns it is on disk. Raises NoRoomError."""
        line = {
            "role": role,
            "index": index,
            "tokens": span_sha256(tokens, start),
            "ids": list(tokens),
            "start": start,
            "kind": kept.kind,
            "about": dict(kept.about),
            "digest": kept.digest,
        }
        text = json.dumps(line).encode()
        append_whole(
            self.path, _LENGTHS.pack(_MAGIC, len(text), len(kept.data)) + text + kept.data, self._end
        )
        self._take(text, len(kept.data))

    def _take(self, text: bytes, size: int) -> None:
        line = json.loads(text)
        at = self._end + _LENGTHS.size + len(text)
        self._places[line["role"], line["index"]] = _Place(at, size, line)
        self._end = at + size

    def _scan(self) -> None:
        with self.path.open("rb") as file:
            while len(head := file.read(_LENGTHS.size)) == _LENGTHS.size:
                magic, length, size = _LENGTHS.unpack(head)
                text, data = (file.read(length), file.read(size)) if magic == _MAGIC else (b"", b"")
                if len(text) != length or len(data) != size or magic != _MAGIC:
                    return
                try:
                    line = json.loads(text)
                    whole = Kept(line["kind"], line["about"], data).digest == line["digest"]
                except (ValueError, KeyError):
                    return
                if not whole:
                    return
                self._take(text, size)


def span_sha256(tokens: Sequence[int], start: int) -> str:
    """Of a conversation's token ids and where its scored tokens begin."""
    return hashlib.sha256(json.dumps([list(tokens), start]).encode()).hexdigest()[:32]
