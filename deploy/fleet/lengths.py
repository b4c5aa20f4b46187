"""How long requests are: mostly short, some long."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Hashable

DECK = 8
"""Lengths of a kind that are drawn before they come again."""


class Lengths:
    """Numbers of tokens as they come, for a wanted mean.

    Quantiles of an exponential distribution, in a new order each time all were drawn: as varied as what
    agents send, and the mean of a few dozen is already the wanted one. Were all alike, sessions would go on
    in step from one engine to the next, and leave the others with nothing to do.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        quantiles = [-math.log(1 - (n + 0.5) / DECK) for n in range(DECK)]
        mean = statistics.mean(quantiles)
        self._shares = [one / mean for one in quantiles]
        self._decks: dict[Hashable, list[float]] = {}

    def share(self, kind: Hashable) -> float:
        """The next length of this kind over its mean."""
        deck = self._decks.setdefault(kind, [])
        if not deck:
            deck.extend(self._rng.sample(self._shares, DECK))
        return deck.pop()

    def draw(self, kind: Hashable, mean: float) -> int:
        """The next length of this kind, at least 1."""
        return max(1, round(mean * self.share(kind)))
