"""JSON Lines: as people and tools write them, and as they are appended here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, with their numbers from 1; a byte-order mark is left out.

    A line ends at a line feed alone: ``str.splitlines`` would also cut at U+2028 and U+0085, which may stand
    within a JSON string. Raises OSError or UnicodeDecodeError.
    """
    text = path.read_bytes().decode("utf-8-sig")
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip(" \t\r")]


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
