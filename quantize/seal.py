"""The seal of a card: a hash of all that it says, written with it and compared when it is read.

It shows that a card was edited, by hand or by a tool, after it was written: figures, verdicts and doubts that
nobody measured. It is no protection against malice, for whoever can write the file can also write a seal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "seal"
"""The field of ``card.json`` that holds it."""
UNSEALED_FORMATS = (2, 3)
"""Formats of cards that were written before there were seals."""


def seal_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of a card's fields without the seal, whatever their order and the white space between them."""
    fields = {name: value for name, value in content.items() if name != SEAL}
    listing = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(listing.encode()).hexdigest()


def sealed(card: str) -> str:
    """The card, a JSON object, with its seal; the text of its file."""
    content = json.loads(card)
    return json.dumps({**content, SEAL: seal_of(content)}, indent=2, ensure_ascii=False) + "\n"


def is_edited(content: Mapping[str, Any]) -> bool:
    """Whether the fields of a card's file are others than those that were sealed."""
    if SEAL not in content:
        return content.get("format") not in UNSEALED_FORMATS
    return bool(content[SEAL] != seal_of(content))
