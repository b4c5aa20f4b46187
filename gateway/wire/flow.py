"""Who may read, write, parse and be kept."""

from __future__ import annotations

from typing import NamedTuple


class Admission(NamedTuple):
    """What may come after a head."""

    tenant: str
    max_body_bytes: int
