"""Yes-or-no properties, measured twice on the same items: is what was lost within a margin?

Of n items, b have the property in the reference's answer alone and c in the variant's alone: a draw from a
multinomial distribution with the probabilities p10 and p01 of the two flips. The true drop is p10 - p01, and
the gate tests the hypothesis "the drop is ``margin`` or more".

**Statistic.** Tango's score (Statistics in Medicine 1998;17:891): the flips' difference less the margin's,
over its standard error at the p01 that is likeliest where the drop *is* the margin.

**p-value.** The score is normal in large samples only: read from the normal table, zero flips of 30 items
would pass a margin of 10 %, and a variant at that limit passes up to 7.1 % of the time. Here the
probability of a score at most as large as the observed one is summed over all outcomes, at the p01 where
this sum is largest (an exact unconditional test; Hsueh, Liu and Chen, Biometrics 2001;57:478). p01 is
searched in its Clopper–Pearson interval of confidence 1 - :data:`NUISANCE`, which is added to the p-value
(Berger and Boos, Journal of the American Statistical Association 1994;89:1012), so that discordances that
the data rule out weaken nothing. Drops beyond the margin need no search: the score rises with b where c is
fixed, so that a larger p10 beside the same p01 makes small scores rarer.

Nothing but the standard library is imported until a p-value is computed; then numpy and scipy.special are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING

from quantize.card import Paired, RoleEvaluation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

ALPHA = 0.05
"""Probability that any variant of a run passes a role whose limit it breaks."""
POWER = 0.9
"""Probability with which a sample is asked to show what is there."""
NUISANCE = 1e-4
"""Part of every p-value: the probability that p01 is not in the interval in which it is searched."""
_TIE = 1e-9
"""Scores this close are equal ones, rounded differently."""
_STEP = 0.25
"""Of the first search for the worst p01, in standard errors."""
_PRECISION = 1e-6
"""Of bounds and margins that are searched."""
_NORMAL = NormalDist()


def drop_p(paired: Paired, margin: float) -> float:
    """p-value against "the drop is ``margin`` or more", for 0 <= margin <= 1."""
    return flips_p(paired.items, paired.flips_to_bad, paired.flips_to_good, margin)


def drop_upper_bound(figures: RoleEvaluation | Paired, alpha: float = ALPHA) -> float:
    """One-sided upper confidence bound of the drop: the margin at which :func:`drop_p` comes to ``alpha``.

    1 where even the whole range is not ruled out. Below 0 where the variant is shown to be better.
    """
    paired = figures if isinstance(figures, Paired) else figures.task
    return flips_bound(paired.items, paired.flips_to_bad, paired.flips_to_good, alpha)


@lru_cache(maxsize=4096)
def flips_p(items: int, to_bad: int, to_good: int, margin: float) -> float:
    """:func:`drop_p` of ``to_bad`` and ``to_good`` flips among ``items``, also for margins below 0."""
    import numpy as np

    if to_bad - to_good >= items * margin:
        return 1.0  # the observed drop is at the limit or beyond: no evidence
    if margin >= 1:
        return 0.0  # the drop cannot be larger
    bad, good = np.array([to_bad, to_good], dtype=np.float64)[:, None]
    most = _most_to_bad(items, margin, float(score(bad, good, items, margin)[0]))
    # p10 and p01 are probabilities and add up to at most 1.
    ends = np.clip(_p01_interval(items, to_good), max(0.0, -margin), (1 - margin) / 2)
    angles = np.arcsin(np.sqrt(ends))  # in which a standard error is as long everywhere
    steps = max(8, math.ceil((angles[1] - angles[0]) * 2 * math.sqrt(items) / _STEP))
    worst = 0.0
    for _ in range(3):  # a grid, and twice a finer one around its highest point
        angles = np.linspace(angles[0], angles[-1], steps + 1)
        found = _probability(items, most, margin, np.sin(angles) ** 2)
        top = int(found.argmax())
        worst = max(worst, float(found[top]))
        angles, steps = angles[max(0, top - 1) : top + 2], 8
    return min(1.0, worst + NUISANCE)


@lru_cache(maxsize=4096)
def flips_bound(items: int, to_bad: int, to_good: int, alpha: float) -> float:
    """:func:`drop_upper_bound` of ``to_bad`` and ``to_good`` flips among ``items``."""
    low = (to_bad - to_good) / items
    high = min(1.0, low + 4 * (math.sqrt(to_bad + to_good) + 3) / items)
    if flips_p.__wrapped__(items, to_bad, to_good, high) > alpha:
        low, high = high, 1.0
    while high - low > _PRECISION:
        middle = (low + high) / 2
        if flips_p.__wrapped__(items, to_bad, to_good, middle) > alpha:
            low = middle
        else:
            high = middle
    return high


def score(to_bad: Array, to_good: Array, items: int, margin: float) -> Array:
    """Tango's statistic of every outcome (b, c) of (k,): small where the drop is below ``margin``."""
    import numpy as np

    two = 2.0 * items
    linear = (two - to_bad + to_good) * margin - to_bad - to_good
    root = np.sqrt(np.maximum(0.0, linear**2 + 4 * two * to_good * margin * (1 - margin)))
    p01 = np.maximum((root - linear) / (2 * two), max(0.0, -margin))
    variance = items * (2 * p01 + margin * (1 - margin))
    statistic: Array = (to_bad - to_good - items * margin) / np.sqrt(np.maximum(variance, 1e-300))
    return statistic


def _p01_interval(items: int, to_good: int) -> tuple[float, float]:
    """Clopper–Pearson interval of p01 of confidence 1 - NUISANCE."""
    from scipy.special import betaincinv

    low = betaincinv(to_good, items - to_good + 1, NUISANCE / 2) if to_good else 0.0
    high = betaincinv(to_good + 1, items - to_good, 1 - NUISANCE / 2) if to_good < items else 1.0
    return float(low), float(high)


def _most_to_bad(items: int, margin: float, observed: float) -> Array:
    """(items + 1,): for every c the largest b whose score is at most ``observed``, -1 where there is none."""
    import numpy as np

    to_good = np.arange(items + 1.0)
    low, high = np.full(items + 1, -1.0), items - to_good + 1
    while (open_ := high - low > 1).any():
        middle = np.floor((low + high) / 2)
        within = score(middle, to_good, items, margin) <= observed + _TIE
        low, high = np.where(open_ & within, middle, low), np.where(open_ & ~within, middle, high)
    return low


def _probability(items: int, most: Array, margin: float, p01: Array) -> Array:
    """(k,): probability that b is at most ``most[c]`` where the drop is ``margin``, for every p01 of (k,)."""
    import numpy as np
    from scipy.special import bdtr, gammaln, xlog1py, xlogy

    # For every p01 the values of c within ten standard errors: the others' share is below 1e-15.
    spread = 10 * np.sqrt(items * p01 * (1 - p01)) + 30
    first = np.maximum(0.0, np.floor(items * p01 - spread))[:, None]
    c = first + np.arange(min(items, int(2 * spread.max()) + 1) + 1)[None, :]
    inside = c <= items
    c, p01 = np.where(inside, c, items), p01[:, None]
    log_ways = gammaln(items + 1) - gammaln(c + 1) - gammaln(items - c + 1)
    mass = np.where(inside, np.exp(log_ways + xlogy(c, p01) + xlog1py(items - c, -p01)), 0.0)
    limit = most[c.astype(np.int64)]
    given = np.broadcast_to(np.clip((p01 + margin) / (1 - p01), 0.0, 1.0), mass.shape)
    matters = (limit >= 0) & (mass > 1e-16)
    below = np.zeros_like(mass)
    below[matters] = bdtr(limit[matters], (items - c[matters]).astype(np.int64), given[matters])
    total: Array = (mass * below).sum(axis=1)
    return total


def provable_drop(paired: Paired, alpha: float = ALPHA, power: float = POWER) -> float:
    """The smallest margin within which a variant that loses nothing is shown to be with ``power``.

    It is what :func:`drop_p` can see on so many items with so many flips: a budget below it asks for more
    items. From the large-sample size of the score test (see :func:`items_needed`), solved for the margin.
    """
    flips = (paired.flips_to_bad + paired.flips_to_good + 1) / (paired.items + 2)
    low, high = 0.0, 1.0
    while high - low > _PRECISION:
        middle = (low + high) / 2
        if items_needed(0.0, flips, middle, alpha, power) <= paired.items:
            high = middle
        else:
            low = middle
    return high


def items_that_decide(
    paired: Paired, margin: float, alpha: float = ALPHA, power: float = POWER
) -> int | None:
    """Items with which :func:`drop_p` is at most ``alpha`` with ``power``, if what was observed is true.

    Observed gains are not counted on. None where the observed drop is not within the margin: more items
    would rather show that it is not.
    """
    if paired.drop >= margin:
        return None
    drop = max(0.0, paired.drop)
    flips = (paired.flips_to_bad + paired.flips_to_good + 1) / (paired.items + 2)
    return max(paired.items + 1, math.ceil(items_needed(drop, flips, margin, alpha, power)))


def items_needed(drop: float, flips: float, margin: float, alpha: float, power: float) -> float:
    """Items for which the score test has ``power`` at a true ``drop`` and a true share ``flips`` of flips.

    ((z_alpha s_0 + z_power s_1) / (margin - drop))^2, where s_1^2 = flips - drop^2 is the variance of a
    difference and s_0^2 the same at the likeliest p01 with a drop of ``margin`` (Nam, Biometrics
    1997;53:1422), but never fewer than pass without any flip: log(alpha) / log(1 - margin).
    """
    if margin <= drop:
        return math.inf
    p10, p01 = (flips + drop) / 2, max(0.0, flips - drop) / 2
    linear = 2 * margin - p10 * (1 + margin) - p01 * (1 - margin)
    least = (math.sqrt(linear**2 + 8 * p01 * margin * (1 - margin)) - linear) / 4
    at_limit = 2 * max(0.0, least) + margin * (1 - margin)
    z_alpha, z_power = _NORMAL.inv_cdf(1 - alpha), _NORMAL.inv_cdf(power)
    spread = z_alpha * math.sqrt(at_limit) + z_power * math.sqrt(max(0.0, flips - drop**2))
    return max((spread / (margin - drop)) ** 2, math.log(alpha) / math.log1p(-min(margin, 1 - 1e-12)))


def fewest_items(margin: float, alpha: float) -> int | None:
    """The fewest items on which answers without any flip pass. None: no number does."""
    if not (margin > 0 and alpha > NUISANCE):
        return None
    return first_that(lambda items: flips_p(items, 0, 0, margin) <= alpha)


def first_that(passes: Callable[[int], bool], most: int = 10_000_000) -> int | None:
    """The first number that passes, where all after it do. None where ``most`` does not."""
    low, high = 0, 1
    while not passes(high):
        low, high = high, 2 * high
        if high > most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def mcnemar_p(to_wrong: int, to_right: int) -> float:
    """Two-sided exact McNemar test: probability of flips at least as one-sided as these."""
    n = to_wrong + to_right
    tail = math.fsum(math.comb(n, k) / 2**n for k in range(min(to_wrong, to_right) + 1))
    return min(1.0, 2 * tail)
