"""How long answers take lately, by kind of request."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Hashable

KEPT = 200
NEEDED = 20
"""Answers below which there is no 95th percentile to speak of."""
MOST_KINDS = 1024
"""Kinds that are kept apart; beyond, the one that was not heard of for longest is forgotten."""


class Latencies:
    """The last ``KEPT`` times of each kind, seconds."""

    def __init__(self) -> None:
        self._recent: OrderedDict[Hashable, tuple[deque[float], list[float]]] = OrderedDict()

    def add(self, kind: Hashable, seconds: float) -> None:
        known = self._recent.get(kind)
        if known is None:
            known = self._recent[kind] = (deque(), [])
            if len(self._recent) > MOST_KINDS:
                self._recent.popitem(last=False)
        else:
            self._recent.move_to_end(kind)
        recent, ordered = known
        recent.append(seconds)
        insort(ordered, seconds)
        if len(recent) > KEPT:
            del ordered[bisect_left(ordered, recent.popleft())]

    def p95(self, kind: Hashable) -> float | None:
        """None while too few are known."""
        _, ordered = self._recent.get(kind, ((), []))
        return ordered[int(0.95 * len(ordered))] if len(ordered) >= NEEDED else None
