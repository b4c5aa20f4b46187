"""The values that pass between what generates and what listens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Event:
    """One server-sent event, or the whole of an answer that is not streamed.

    ``data`` is None for what is no JSON: ``[DONE]`` (then ``done``) and comments.
    """

    raw: bytes
    data: dict[str, Any] | None = None
    done: bool = False
