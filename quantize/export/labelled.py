"""Texts and labels that a classifier is trained on, and scales are taken from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantize.core.jsonl import read_lines
from quantize.export.types import ExportError


def labelled_rows(path: Path) -> list[tuple[str, str]]:
    """Texts and their labels from JSON Lines: ``{"text": …, "label": …}``, or items and conversations of
    which the last user's message is the text and the right answer the label. Raises ExportError."""
    found = []
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
            if "text" in row:
                found.append((_text(row["text"]), _label(row["label"])))
                continue
            messages = row["messages"]
            text = [one["content"] for one in messages if one["role"] == "user"][-1]
            label = row.get("expected") or [o["content"] for o in messages if o["role"] == "assistant"][-1]
            found.append((_text(text), _label(label)))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise ExportError(
                f'{path}:{number}: has no text and label; each line must be {{"text": …, "label": …}}, or a '
                "conversation that ends with the label"
            ) from None
    return found


def _text(content: Any) -> str:
    """A message's content, of several parts their texts, as the engine reads them. Raises TypeError."""
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content if part.get("type") == "text") or None
    if not isinstance(content, str):
        raise TypeError(content)
    return content


def _label(label: Any) -> str:
    """A text or a number. Raises TypeError: nothing is no label, nor is a list."""
    if isinstance(label, bool) or not isinstance(label, str | int | float) or not str(label).strip():
        raise TypeError(label)
    return str(label)
