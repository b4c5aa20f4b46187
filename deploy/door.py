"""Where a gateway or an engine is asked, and with what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Door:
    """An address, and the headers that are sent there. ``local``: its certificate is of the name that clients
    use, not of this machine."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    local: bool = False
