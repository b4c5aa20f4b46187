"""Statistics that may be looked at after every answer. Outcomes are yes-or-no: an answer is bad, or it is
not.

``Cusum`` watches for a change without an end, ``Sprt`` decides once, ``confidence_sequence`` is what people
look at. ``corrected_share`` takes a judge's own errors out of the share that it found.

Sources: Wald 1945 (SPRT); Page 1954 and Lorden 1971 (CUSUM and its false alarms); Robbins 1970 and Howard et
al. 2021, arXiv:1810.08240 (mixture martingales, confidence sequences); Rogan and Gladen 1978 (corrected
prevalence).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property


@dataclass(frozen=True)
class Rates:
    """The share of bad answers that is tolerated, and the share that must be noticed; 0 < p0 < p1 < 1."""

    tolerated: float
    alarming: float

    def __post_init__(self) -> None:
        if not 0 < self.tolerated < self.alarming < 1:
            raise ValueError(
                f"tolerated {self.tolerated} and alarming {self.alarming} must be shares, the first one lower"
            )

    @cached_property
    def if_bad(self) -> float:
        """Nats of evidence for ``alarming`` against ``tolerated`` from one bad answer."""
        return math.log(self.alarming / self.tolerated)

    @cached_property
    def if_good(self) -> float:
        """The same from one that is not bad: below zero."""
        return math.log((1 - self.alarming) / (1 - self.tolerated))

    def evidence(self, bad: bool) -> float:
        return self.if_bad if bad else self.if_good


class Cusum:
    """Evidence since the time that speaks most for a change, in nats.

    While the share of bad answers is ``tolerated`` or less, it takes ``exp(h)`` answers on average, or more,
    until ``h`` is reached, so that an answer is a false alarm with a probability of at most ``exp(-h)`` in
    the long run: over any number of roles and variants together, since every answer counts at one of them.
    """

    __slots__ = ("rates", "value")

    def __init__(self, rates: Rates, value: float = 0.0) -> None:
        self.rates, self.value = rates, value

    def add(self, bad: bool) -> float:
        self.value = max(0.0, self.value + self.rates.evidence(bad))
        return self.value


def threshold(answers_per_false_alarm: float, checks: int = 1) -> float:
    """Nats at which a ``Cusum`` alarms, so that of ``checks`` of them one in so many answers does falsely."""
    return math.log(answers_per_false_alarm * checks)


class Decision(StrEnum):
    HEALTHY = "healthy"
    HARMED = "harmed"


class Sprt:
    """Wald's test: decides between the two rates with as few answers as possible.

    ``alpha``: the probability of calling a share of ``tolerated`` harmed; ``beta``: of calling a share of
    ``alarming`` healthy.
    """

    __slots__ = ("_lower", "_upper", "rates", "value")

    def __init__(self, rates: Rates, alpha: float = 0.05, beta: float = 0.01, value: float = 0.0) -> None:
        self.rates, self.value = rates, value
        self._upper = math.log((1 - beta) / alpha)
        self._lower = math.log(beta / (1 - alpha))

    def add(self, bad: bool) -> Decision | None:
        """None while there is not enough evidence."""
        self.value += self.rates.evidence(bad)
        if self.value >= self._upper:
            return Decision.HARMED
        return Decision.HEALTHY if self.value <= self._lower else None


def confidence_sequence(bad: int, answers: int, alpha: float = 0.05) -> tuple[float, float]:
    """An interval of the share of bad answers that holds at all times together with probability 1 - alpha.

    It is the set of shares against which a Beta(1/2, 1/2) mixture has not won ``1 / alpha``.
    """
    if answers == 0:
        return 0.0, 1.0
    good = answers - bad
    mixture = math.lgamma(bad + 0.5) + math.lgamma(good + 0.5) - math.lgamma(answers + 1) - math.log(math.pi)
    limit = mixture + math.log(alpha)

    def inside(share: float) -> bool:
        """Whether the likelihood of ``share`` is still above the limit."""
        likely = (bad * math.log(share) if bad else 0.0) + (good * math.log1p(-share) if good else 0.0)
        return likely > limit

    middle = min(max(bad / answers, 1e-12), 1 - 1e-12)
    return (
        0.0 if bad == 0 else _edge(inside, middle, 0.0),
        1.0 if good == 0 else _edge(inside, middle, 1.0),
    )


def _edge(inside: object, within: float, outside: float) -> float:
    assert callable(inside)
    for _ in range(60):
        middle = (within + outside) / 2
        if 0 < middle < 1 and inside(middle):
            within = middle
        else:
            outside = middle
    return outside


@dataclass(frozen=True)
class Corrected:
    """A share with its 95 % interval, after a judge's errors have been taken out; within 0 and 1."""

    share: float
    low: float
    high: float


def corrected_share(
    found: int, answers: int, sensitivity: float, specificity: float, labelled: tuple[int, int]
) -> Corrected | None:
    """The true share of bad answers when a judge found ``found`` of ``answers``.

    ``labelled``: bad and good answers on which the judge's two figures were measured; their uncertainty is
    part of the interval. None when the judge does no better than chance: it says nothing then.
    """
    power = sensitivity + specificity - 1
    if power <= 0 or not answers or not all(labelled):
        return None
    seen = found / answers
    share = (seen + specificity - 1) / power
    variance = (
        seen * (1 - seen) / answers
        + share**2 * sensitivity * (1 - sensitivity) / labelled[0]
        + (1 - share) ** 2 * specificity * (1 - specificity) / labelled[1]
    ) / power**2
    half = 1.96 * math.sqrt(variance)
    return Corrected(*(min(1.0, max(0.0, value)) for value in (share, share - half, share + half)))
