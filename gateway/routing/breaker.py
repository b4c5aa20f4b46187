"""The breaker of one replica: when to leave it alone, and when to try it again.

A connection that cannot be made opens it at once; three broken answers in a row (5xx, time-out, a
stream that died) open it too. It stays open for a back-off of 1 s that doubles up to 30 s with each
further failure. A client's mistake (4xx) never counts. A health probe that succeeds closes it at once
if it was opened because the replica could not be reached; one that was opened by broken answers waits
its back-off out, since such an engine often still reports that it is healthy.
"""

from __future__ import annotations

from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds that never go backwards, such as ``time.monotonic``."""

FIRST_BACK_OFF_S = 1.0
LONGEST_BACK_OFF_S = 30.0
BROKEN_ANSWERS_IN_A_ROW = 3
ALWAYS = float("-inf")


class Breaker:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._open_until = ALWAYS
        self._back_off = FIRST_BACK_OFF_S
        self._broken = 0
        self._unreachable = False
        self.no_failures = True
        """Nothing has gone wrong since the replica last answered."""

    @property
    def closed(self) -> bool:
        """Whether the replica may be tried."""
        return self._open_until == ALWAYS or self._clock() >= self._open_until

    def answered(self) -> None:
        """It answered, be it with a 4xx: it works."""
        self.no_failures = True
        self._open_until = ALWAYS
        self._back_off = FIRST_BACK_OFF_S
        self._broken = 0
        self._unreachable = False

    def not_reached(self) -> None:
        """No connection could be made, or it reports that its engine is dead."""
        self._unreachable = True
        self.no_failures = False
        self._open()

    def answer_broke(self) -> None:
        self._broken += 1
        self.no_failures = False
        if self._broken >= BROKEN_ANSWERS_IN_A_ROW:
            self._open()

    def errored(self) -> None:
        self.answer_broke()

    def silent(self) -> None:
        self.answer_broke()

    def healthy(self) -> None:
        """A health probe succeeded."""
        if self._unreachable:
            self.answered()

    def _open(self) -> None:
        if self.closed:
            self._open_until = self._clock() + self._back_off
            self._back_off = min(2 * self._back_off, LONGEST_BACK_OFF_S)
