"""How long answers take lately, by role and variant: what hedging waits for."""

from __future__ import annotations

from bisect import insort
from collections import deque

KEPT = 200
NEEDED = 20
"""Answers below which there is no 95th percentile to speak of."""


class Latencies:
    """The last answers' times to their first byte, seconds."""

    def __init__(self) -> None:
        self._recent: dict[tuple[str, str], tuple[deque[float], list[float]]] = {}

    def add(self, role: str, variant: str, seconds: float) -> None:
        recent, ordered = self._recent.setdefault((role, variant), (deque(), []))
        recent.append(seconds)
        insort(ordered, seconds)
        if len(recent) > KEPT:
            ordered.remove(recent.popleft())

    def p95(self, role: str, variant: str) -> float | None:
        """None while too few are known."""
        _, ordered = self._recent.get((role, variant), ((), []))
        return ordered[int(0.95 * len(ordered))] if len(ordered) >= NEEDED else None
