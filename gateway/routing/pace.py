"""How soon a pool is expected to answer, by what this gateway has seen of it lately.

Of every pool two things are learned, each together with the requests that its replicas had in flight: seconds
to the first token of a stream, and seconds per token written. What they will be at the present load follows
from the straight line through what was seen, whose slope is taken to be between none (the load makes no
difference) and proportional (twice the load, twice as long); where the load was always the same, it is
proportional. How many tokens an answer has is learned by role.

A pool of which nothing is known is expected to be in time. One that was too slow is not asked any more, so
that nothing new would ever be learned of it: when it has been idle for a while, one request tries it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from gateway.config import Target
from gateway.routing.pools import Pool

FADE_S = 10.0
"""What was seen this long ago counts a third of what is seen now."""
LEAST_SHARE = 0.1
"""Of a new value in the average, however soon it comes after the last one."""
AGAIN_AFTER_S = 30.0
"""An idle pool that was too slow is tried again this long after it was last heard of."""


class Trend:
    """An average of late, as a straight line over the load."""

    __slots__ = ("at", "load", "load2", "mean", "product")

    def __init__(self, value: float, load: float, now: float) -> None:
        self.at = now
        self.mean, self.load = value, load
        self.load2, self.product = load * load, load * value

    def add(self, value: float, load: float, now: float) -> None:
        share = max(LEAST_SHARE, 1 - math.exp((self.at - now) / FADE_S))
        self.at = now
        self.mean += share * (value - self.mean)
        self.load += share * (load - self.load)
        self.load2 += share * (load * load - self.load2)
        self.product += share * (load * value - self.product)

    def expected(self, load: float) -> float:
        """The value at a load; never below zero."""
        steepest = self.mean / self.load
        spread = self.load2 - self.load * self.load
        slope = steepest
        if spread > 1e-9 * self.load2:
            slope = (self.product - self.load * self.mean) / spread
        return self.mean + min(max(slope, 0.0), steepest) * (load - self.load)


class Paces:
    """One per process; it outlives changes of the configuration."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._first: dict[str, Trend] = {}
        """Variant to seconds until the first token."""
        self._token: dict[str, Trend] = {}
        """Variant to seconds per token."""
        self._tokens: dict[str, Trend] = {}
        """Role to tokens of an answer; no load has to do with it."""

    def first_token(self, variant: str, seconds: float, load: int) -> None:
        """A stream has begun after so long. ``load``: requests in flight at its replica, itself included."""
        _note(self._first, variant, seconds, load, self._clock())

    def answered(self, variant: str, role: str, tokens: int, seconds: float, load: int) -> None:
        """An answer has ended, for whose ``tokens`` it took so long."""
        now = self._clock()
        _note(self._token, variant, seconds / tokens, load, now)
        _note(self._tokens, role, tokens, 1, now)

    def expected(self, pool: Pool, role: str) -> tuple[float | None, float | None]:
        """Seconds to the first token, and to the end, of one more request. None: nothing is known."""
        usable = pool.usable()
        if not usable:
            return None, None
        in_flight = sum(replica.in_flight for replica in usable)
        if not in_flight and self._clock() > self._heard_at(pool.variant) + AGAIN_AFTER_S:
            return None, None
        load = in_flight / len(usable) + 1
        first, token = self._first.get(pool.variant), self._token.get(pool.variant)
        tokens = self._tokens.get(role)
        first_s = None if first is None else first.expected(load)
        if token is None or tokens is None:
            return first_s, None
        return first_s, (first_s or 0.0) + token.expected(load) * tokens.mean

    def in_time(self, pool: Pool, role: str, target: Target) -> bool:
        """Whether one more request is expected to be answered within the target."""
        first_s, total_s = self.expected(pool, role)
        return _within(first_s, target.ttft_s) and _within(total_s, target.total_s)

    def _heard_at(self, variant: str) -> float:
        return max(
            (known[variant].at for known in (self._first, self._token) if variant in known), default=0.0
        )


def _within(expected: float | None, limit: float | None) -> bool:
    return expected is None or limit is None or expected <= limit


def _note(known: dict[str, Trend], name: str, value: float, load: float, now: float) -> None:
    if (trend := known.get(name)) is None:
        known[name] = Trend(value, load, now)
    else:
        trend.add(value, load, now)
