"""When a second replica is asked as well, and how often at most.

A request is hedged when it has waited longer than 95 % of the last answers of its kind: a whole answer is not
compared with a stream's first byte, nor an embedding with a chat. The budget is a token bucket: every request
that may be hedged adds a share of a token, every hedge takes one. When all replicas have become slow at once,
hedges therefore add that share to the load, and no more.
"""

from __future__ import annotations

from gateway.telemetry.latencies import Latencies

Kind = tuple[str, str, str, bool]
"""Role, variant, the endpoint's path, and whether the answer is streamed."""
BURST = 3.0
"""Hedges that may follow each other at once."""


class Hedging:
    """One per process; it outlives changes of the configuration."""

    def __init__(self) -> None:
        self._latencies = Latencies()
        self._tokens = BURST

    def delay(self, kind: Kind, share: float) -> float | None:
        """After how many seconds to ask a second replica; None: not at all. Called once for each request
        that may be hedged. ``share``: hedges per request that the budget allows in the long run."""
        if share <= 0:
            return None
        self._tokens = min(BURST, self._tokens + share)
        return self._latencies.p95(kind)

    def seconds(self, kind: Kind, seconds: float) -> None:
        """How long it took until an answer began to come, or came whole, if it is not streamed."""
        self._latencies.add(kind, seconds)

    def allow(self) -> bool:
        """Whether the budget has room for a hedge; it is taken from there."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
