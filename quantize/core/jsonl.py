"""JSON Lines: as people and tools write them, and as they are appended here."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantize.core.files import append_whole


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, with their numbers from 1; a byte-order mark is left out.

    A line ends at a line feed alone: ``str.splitlines`` would also cut at U+2028 and U+0085, which may stand
    within a JSON string. Raises OSError or UnicodeDecodeError.
    """
    text = path.read_bytes().decode("utf-8-sig")
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip(" \t\r")]


def read_json(text: str) -> Any:
    """The value that a line says. Raises ValueError for what is no JSON, and for what Python's reader takes
    and nobody means: a key that is given twice, half of a surrogate pair, levels beyond its stack."""
    try:
        found = json.loads(text, object_pairs_hook=_object)
        json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is no text") from None
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is given twice; keep one")
    return found


def read_kept(path: Path) -> list[Any]:
    """The entries of a file to which one process at a time appends a line each; none where there is no file.

    A line that a killed process had begun is cut off, so that the next one does not go on in it; what is no
    JSON in the middle, as after a power cut, is passed over.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = raw.rfind(b"\n") + 1
    if whole < len(raw):
        os.truncate(path, whole)
    entries = []
    for line in raw[:whole].split(b"\n"):
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def append_kept(path: Path, entries: Sequence[Any]) -> None:
    """Add entries to such a file, after it was read; all of them are on the disk then, or none. Raises
    NoRoomError."""
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    append_whole(path, text.encode(), path.stat().st_size if path.exists() else 0)
