"""How many answers are asked again of a more precise variant."""

from __future__ import annotations


class Escalations:
    """Bounds the share of a role's answers that are asked again, so that a harmed variant does not double the
    load on the next one: the watch is there to demote it."""

    _GRACE, _MEMORY = 20, 2000

    def __init__(self, share: float) -> None:
        self._share = share
        self._counts: dict[str, list[float]] = {}

    def allows(self, role: str, wanted: bool) -> bool:
        """Count an answer; whether it may be asked again, if that is ``wanted``."""
        counts = self._counts.setdefault(role, [0.0, 0.0])
        counts[0] += 1
        if counts[0] > self._MEMORY:
            counts[:] = [count / 2 for count in counts]
        allowed = wanted and counts[1] + 1 <= self._share * (counts[0] + self._GRACE)
        counts[1] += allowed
        return allowed
