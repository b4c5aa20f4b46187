"""JSON Lines as people and tools write them."""

from __future__ import annotations

from pathlib import Path


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, with their numbers from 1; a byte-order mark is left out.

    A line ends at a line feed alone: ``str.splitlines`` would also cut at U+2028 and U+0085, which may stand
    within a JSON string. Raises OSError or UnicodeDecodeError.
    """
    text = path.read_bytes().decode("utf-8-sig")
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip(" \t\r")]
