"""A mean over conversations: is it below a limit? Student's t, made to hold where the figures are skewed.

Losses per conversation have a long right tail: most are small, a few are large. A sample that happens to
lack the large ones has a mean *and* a standard error that are too small, and the ordinary t-test then
passes a variant that is at its limit in 17 % of samples of 20 instead of 5 % (log-normal, standard
deviation of the logarithm 1). Hall's transformation (Journal of the Royal Statistical Society B
1992;54:221) takes the skewness g out of t = (mean - limit) / standard error:

    h(t) = t + g t^2 / (3 sqrt(n)) + g^2 t^3 / (27 n) + g / (6 sqrt(n)),

which is compared with Student's t of n - 1 degrees of freedom. Two things are ours.

- The skewness of a small sample is an underestimate. For figures that cannot be negative (a KL) it is taken
  from their coefficient of variation v, which a sample shows much better, as a log-normal distribution's:
  v^3 + 3v, with 0.5 / sqrt(n) of it added (:func:`skewness_of_positive`). That is more than a gamma
  distribution's 2v. For a difference, which has no such bound, it is the sample's skewness, enlarged, and
  at least :data:`LEAST_SKEWNESS` (:func:`skewness_of_difference`).
- The cubic flattens where g t / sqrt(n) is about -3, and beyond its expansion is not valid; from -4.5 on
  the line h(t) = t / 4, which touches it there, is used. It is what a skewness that is smaller than ``g``
  makes of ``t`` at worst, so that an overestimate of g never helps.

tests/quantize/test_error_rates.py simulates the error rate: at most 5 % (and 0.5 % at a level of 0.5 %) for
log-normal distributions up to a standard deviation of the logarithm of 1.5, for gamma distributions from a
shape of 0.25, from 20 conversations on. No test of a mean holds for every distribution: of 20
conversations, none need show the one in a hundred in which everything is lost (Bahadur and Savage, Annals
of Mathematical Statistics 1956;27:1115).

scipy.special is imported when a figure is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from quantize.gate.paired import ALPHA, POWER, first_that

LEAST_SEQUENCES = 20
"""Conversations below which a standard error over conversations is no evidence."""
LEAST_SKEWNESS = 2.0
"""Of a difference that may have either sign; an exponential distribution's."""
_TOUCH = -1.5
"""g t / (3 sqrt(n)) at which the cubic has the slope of its chord from 0, a quarter."""


@dataclass(frozen=True)
class ClusteredMean:
    """A mean over ``sequences`` conversations, its clustered standard error, and the skewness to assume."""

    mean: float
    error: float
    sequences: int
    skewness: float

    def p(self, limit: float) -> float:
        """p-value against "the true mean is ``limit`` or more"."""
        from scipy.special import stdtr

        if not self.mean < limit or math.isnan(self.error):
            return 1.0
        if self.sequences < LEAST_SEQUENCES:
            return 1.0
        if self.error <= 0:
            return 0.0
        t = (self.mean - limit) / self.error
        return float(stdtr(self.sequences - 1, transformed(t, self.skewness, self.sequences)))

    def upper_bound(self, alpha: float = ALPHA) -> float:
        """One-sided upper confidence bound: the limit at which :meth:`p` is ``alpha``."""
        if self.sequences < 2:
            return math.inf
        return self.mean - self.error * critical_t(alpha, self.skewness, self.sequences)

    def lower_bound(self, alpha: float = ALPHA) -> float:
        """One-sided lower bound by the ordinary t, which a tail on the right makes err on the safe side."""
        if self.sequences < 2:
            return -math.inf
        return self.mean + self.error * critical_t(alpha, 0.0, self.sequences)

    def sequences_that_decide(self, limit: float, alpha: float, power: float = POWER) -> int | None:
        """Conversations with which :meth:`p` is at most ``alpha`` with about ``power``; None: none would."""
        if self.mean >= limit:
            return None
        spread, z = self.error * math.sqrt(self.sequences), NormalDist().inv_cdf(power)

        def decides(count: int) -> bool:
            if count < LEAST_SEQUENCES:
                return False
            reach = z - critical_t(alpha, self.skewness, count)
            return reach * spread / math.sqrt(count) <= limit - self.mean

        found = first_that(decides)
        return None if found is None else max(self.sequences + 1, found)


def positive_mean(mean: float, error: float, sequences: int) -> ClusteredMean:
    """The mean of figures that cannot be negative."""
    variation = error * math.sqrt(sequences) / mean if mean > 0 else 0.0
    return ClusteredMean(mean, error, sequences, skewness_of_positive(variation, sequences))


def mean_difference(mean: float, error: float, sequences: int, skewness: float) -> ClusteredMean:
    """The mean of figures of either sign, whose sample skewness is known."""
    return ClusteredMean(mean, error, sequences, skewness_of_difference(skewness, sequences))


def skewness_of_positive(variation: float, sequences: int) -> float:
    """Skewness to assume of figures with a coefficient of variation ``variation``; see the module."""
    return (variation**3 + 3 * variation) * (1 + 0.5 / math.sqrt(max(1, sequences)))


def skewness_of_difference(sample: float, sequences: int) -> float:
    """Skewness to assume of figures with a skewness of ``sample`` among ``sequences``; see the module."""
    return max(LEAST_SKEWNESS, sample * (1.5 + 2 / math.sqrt(max(1, sequences))))


def transformed(t: float, skewness: float, count: int) -> float:
    """h(t) of the module's docstring: rises with t, and has Student's distribution where the mean is true."""
    root = math.sqrt(count)
    x = skewness * t / (3 * root)
    x = max(x, _TOUCH) if t < 0 else x
    return t * (1 + x + x * x / 3) + skewness / (6 * root)


def critical_t(alpha: float, skewness: float, count: int) -> float:
    """The t at which :func:`transformed` is Student's ``alpha`` quantile: below 0 for small alpha."""
    from scipy.special import stdtrit

    root = math.sqrt(count)
    aim = float(stdtrit(count - 1, alpha)) - skewness / (6 * root)
    if skewness == 0:
        return aim
    cube = 1 + skewness * aim / root  # (1 + x)^3
    if cube < (1 + _TOUCH) ** 3:
        return 4 * aim
    return 3 * root / skewness * (math.cbrt(cube) - 1)
