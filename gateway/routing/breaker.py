"""The breaker of one replica: when to leave it alone, and when to try it again.

====================  ==============================  =====================  ==============================
what happens          closed                          open                   half-open (the back-off is over)
====================  ==============================  =====================  ==============================
a request comes       goes                            goes elsewhere         the first goes, others elsewhere
``answered``          forgets failures                closes                 closes
``heard``                                                                    closes; the next failure opens it
``errored``,          the third in a row opens it                            opens, back-off doubled
``silent``
``not_reached``       opens                           also unreachable now   opens, back-off doubled
``abandoned``                                                                the next request may go
``healthy`` (probe)                                   closes if unreachable  closes if unreachable
the back-off is over                                  half-open
====================  ==============================  =====================  ==============================

The back-off begins at 1 s and doubles up to 30 s with each time that the breaker opens, until an answer has
come whole. The place of the one request that a half-open breaker lets in is its own from ``take`` until
its lease is released, whatever others report meanwhile; a request that ends without a verdict, since its
client has left or another replica was faster, has just given it back.

* A client's mistake (4xx) is an answer: the engine works.
* Some requests make a sound engine answer 500. Where there are several keys, whole 5xx answers open it only
  when they went to two of them: nobody takes a replica away from others by sending such requests.
* ``silent`` is for an engine from which no byte of an answer came and which made no progress with any other
  request either, by its own count of tokens. An answer that takes long is nobody's failure.
* A probe closes only what was opened because the replica could not be reached: one that answers 500 often
  still reports that it is healthy.
* A pool that no other stands behind does not wait a long back-off out (``may_try_early``): where all of its
  replicas have failed, one request a second is let in at each that can be reached; others are refused at
  once.
"""

from __future__ import annotations

from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds that never go backwards, such as ``time.monotonic``."""

FIRST_BACK_OFF_S = 1.0
LONGEST_BACK_OFF_S = 30.0
FAILURES_IN_A_ROW = 3


class Breaker:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._open_until: float | None = None
        """None while it is closed."""
        self._back_off = FIRST_BACK_OFF_S
        self._failures = 0
        self._blamed: set[str] = set()
        """Whose requests have failed since it last answered."""
        self._unreachable = False
        self._tried_at = 0.0
        """When it was opened, or a request was let in."""
        self._tickets = 0
        self._trial = 0
        """The ticket of the request that was let in; 0 while there is none."""
        self.no_failures = True
        """Nothing has gone wrong since the replica last answered. It is closed then."""

    @property
    def closed(self) -> bool:
        """Whether it stands in nobody's way."""
        return self._open_until is None

    @property
    def free(self) -> bool:
        """Whether a request may go to the replica now."""
        return self._open_until is None or (not self._trial and self._clock() >= self._open_until)

    @property
    def may_try_early(self) -> bool:
        """Whether, where the only other choice is to refuse, a request may go although it is open."""
        return (
            not self._trial and not self._unreachable and self._clock() >= self._tried_at + FIRST_BACK_OFF_S
        )

    def take(self) -> int:
        """A request goes to the replica; gives the ticket of the one that is let in, else 0."""
        if self._open_until is None or self._trial:
            return 0
        self._tickets += 1
        self._trial = self._tickets
        self._tried_at = self._clock()
        return self._trial

    def abandoned(self, ticket: int) -> None:
        """The request with this ticket is over. What it had to tell has been told before."""
        if ticket == self._trial:
            self._trial = 0

    def answered(self) -> None:
        """An answer came whole, be it a 4xx: it works."""
        self._close()
        self._back_off = FIRST_BACK_OFF_S
        self._failures = 0
        self._blamed.clear()
        self.no_failures = True

    def heard(self) -> None:
        """An answer has begun, or tokens were written: who waits need not wait for the answer's end."""
        if self._trial:
            self._close()
            self._failures = FAILURES_IN_A_ROW - 1

    def errored(self, whose: str = "") -> None:
        """It answered with a 5xx, or broke its answer off. ``whose``: the key of the request, where there are
        several and the request itself may be the reason; one key's requests alone do not open it."""
        self._failures += 1
        self._blamed.add(whose)
        self.no_failures = False
        if self._failures >= FAILURES_IN_A_ROW and ("" in self._blamed or len(self._blamed) > 1):
            self._open()

    def silent(self) -> None:
        """Nothing came of it for as long as anybody would wait."""
        self.errored()

    def not_reached(self) -> None:
        """No connection could be made, or it reports that its engine is dead."""
        self._unreachable = True
        self.no_failures = False
        self._open()

    def healthy(self) -> None:
        """A health probe succeeded."""
        if self._unreachable:
            self.answered()

    def _open(self) -> None:
        now = self._clock()
        if self._open_until is None or now >= self._open_until:
            self._tried_at = now
            self._open_until = now + self._back_off
            self._back_off = min(2 * self._back_off, LONGEST_BACK_OFF_S)

    def _close(self) -> None:
        self._open_until = None
        self._trial = 0
        self._unreachable = False
