"""A share of answers: is it large enough? Exact binomial tests, and the intervals that invert them.

scipy.special is imported when a figure is computed.
"""

from __future__ import annotations

import math

from quantize.gate.paired import ALPHA, POWER, first_that


def share_p(good: int, items: int, least: float) -> float:
    """p-value against "the true share is ``least`` or less": P(X >= good) for X of binomial(items, least).

    At ``least`` 1 it is 1: no number of answers shows that none is ever bad.
    """
    from scipy.special import betainc

    if good == 0 or least >= 1:
        return 1.0
    return float(betainc(good, items - good + 1, least))


def share_lower_bound(good: int, items: int, alpha: float = ALPHA) -> float:
    """One-sided lower confidence bound of a share (Clopper and Pearson, Biometrika 1934;26:404)."""
    from scipy.special import betaincinv

    return float(betaincinv(good, items - good + 1, alpha)) if good else 0.0


def items_of_share(share: float, least: float, items: int, alpha: float, power: float = POWER) -> int | None:
    """Items with which :func:`share_p` is at most ``alpha`` with ``power`` if ``share`` is true.

    None where the share is not above its limit.
    """
    if share <= least or least >= 1:
        return None
    found = first_that(lambda count: share_power(share, least, count, alpha) >= power)
    return None if found is None else max(items + 1, found)


def share_power(share: float, least: float, items: int, alpha: float) -> float:
    """Probability that :func:`share_p` is at most ``alpha`` where ``share`` is the true one."""
    from scipy.special import bdtrc

    low, high = -1, items + 1  # answers that do not pass, and that do
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if share_p(middle, items, least) <= alpha else (middle, high)
    return float(bdtrc(high - 1, items, share)) if high <= items else 0.0


def fewest_answers(least: float, alpha: float) -> int | None:
    """The fewest answers that pass if all of them are good. None: no number does."""
    if least >= 1:
        return None
    return 1 if least <= alpha else max(1, math.ceil(math.log(alpha) / math.log(least) - 1e-9))


def wilson_interval(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion (95 % two-sided by default), for tables; gates are exact."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)
