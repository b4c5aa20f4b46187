"""An answer while it passes by: its usage, when its parts arrived, and the parts themselves, unread.

This runs on the event loop, once per event. What the answer says is found out later and elsewhere
(:mod:`gateway.quality.transcript`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

LONGEST = 4 << 20
"""Bytes of an answer beyond which it is not kept for the checks."""


class Answer:
    """Usage is the engine's own count. A stream that broke off has the count of its last chunk, since engines
    are asked for it with every chunk; a provider that gives none leaves ``prompt_tokens`` None."""

    __slots__ = (
        "_last_at",
        "completion_tokens",
        "events",
        "first_token_at",
        "gaps_s",
        "prompt_tokens",
        "size",
        "too_long",
    )

    def __init__(self) -> None:
        self.prompt_tokens: int | None = None
        self.completion_tokens = 0
        self.first_token_at: float | None = None
        self.gaps_s: list[float] = []
        self._last_at = 0.0
        self.events: list[bytes] = []
        """Those that say something, as they came."""
        self.size = 0
        """Bytes of all events that said something."""
        self.too_long = False
        """There was more than is kept: ``events`` is empty then."""

    def add(self, data: Mapping[str, Any], at: float, raw: bytes | None = None) -> None:
        """Take in one event of the engine that arrived at ``at`` (seconds of the gateway's clock). ``raw``:
        the bytes that it came as, which saves encoding it."""
        usage: Any = data.get("usage")
        if counted := isinstance(usage, dict):
            self.prompt_tokens = max(0, int(usage.get("prompt_tokens") or 0))
            self.completion_tokens = max(0, int(usage.get("completion_tokens") or 0))
        choices = data.get("choices")
        if not choices:
            return
        self._keep(raw if raw is not None else msgspec.json.encode(data))
        grew = _tokens(choices)
        if not grew:
            return
        if self.first_token_at is None:
            self.first_token_at = at
        else:
            self.gaps_s.append(at - self._last_at)
        self._last_at = at
        if not counted:
            self.completion_tokens += grew

    def _keep(self, raw: bytes) -> None:
        self.size += len(raw)
        if self.size > LONGEST:
            self.too_long = True
            self.events.clear()
        else:
            self.events.append(raw)


def _tokens(choices: Iterable[Mapping[str, Any]]) -> int:
    """Tokens that the choices grew by: counted by log-probabilities where there are any, else one each."""
    grew = 0
    for choice in choices:
        logprobs = choice.get("logprobs")
        content = logprobs.get("content") if isinstance(logprobs, dict) else None
        if content:
            grew += len(content)
            continue
        part = choice.get("delta") or choice.get("message") or choice
        grew += bool(
            part.get("content")
            or part.get("text")
            or part.get("tool_calls")
            or part.get("reasoning")
            or part.get("reasoning_content")
        )
    return grew
