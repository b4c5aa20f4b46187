"""The seam to whatever generates: one method, and the values that pass through it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

from gateway.routing.pools import Replica


@dataclass(frozen=True, slots=True)
class Call:
    """What to ask. ``path`` is the endpoint, such as ``/v1/chat/completions``."""

    path: str
    body: dict[str, Any]
    stream: bool


@dataclass(slots=True)
class Event:
    """One server-sent event, or the whole of an answer that is not streamed.

    ``data`` is None for what is no JSON: ``[DONE]`` (then ``done``) and comments.
    """

    raw: bytes
    data: dict[str, Any] | None = None
    done: bool = False


class Reply(Protocol):
    """An answer whose first event has arrived."""

    busy_s: float
    """Seconds spent on decoding so far: work of the gateway, not waiting."""

    def batches(self) -> AsyncIterator[list[Event]]:
        """Events as they come, those of one read together. Raises UpstreamError when it breaks off."""
        ...

    async def close(self) -> None:
        """Stop the generation, if it still runs. Safe to call at any time and twice."""
        ...


class Upstream(Protocol):
    async def open(self, replica: Replica, call: Call) -> Reply:
        """Send the request and wait for the first event.

        Raises UpstreamError or a kind of it: NeverReachedError may be tried elsewhere. Cancelling it
        stops the generation.
        """
        ...
