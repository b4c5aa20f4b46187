"""Statistics of yes-or-no properties, measured twice on the same items. Light: the gateway uses them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist

from quantize.card import Paired, RoleEvaluation

ALPHA = 0.05
"""Probability that any variant of a run passes a role whose limit it breaks."""
POWER = 0.9
"""Probability with which a sample is asked to show what is there."""
Z_ONE_SIDED_95 = 1.6448536269514722

_NORMAL = NormalDist()


def drop_upper_bound(figures: RoleEvaluation | Paired, z: float = Z_ONE_SIDED_95) -> float:
    """One-sided upper confidence bound of accuracy(reference) - accuracy(variant), paired.

    Agresti and Min's adjusted Wald interval for matched pairs (Statistics in Medicine 2005;24:729), which
    stays sensible with few or no flips.
    """
    paired = figures if isinstance(figures, Paired) else figures.task
    difference, spread, n = _adjusted(paired)
    return (difference + z * spread) / n


def drop_p(paired: Paired, margin: float) -> float:
    """p-value against "the drop is ``margin`` or more", by inverting :func:`drop_upper_bound`."""
    difference, spread, n = _adjusted(paired)
    return _NORMAL.cdf((difference - margin * n) / spread)


def _adjusted(paired: Paired) -> tuple[float, float, float]:
    """Agresti and Min's difference of flips, its standard error, and the items they count as."""
    worse, better = paired.flips_to_bad + 0.5, paired.flips_to_good + 0.5
    n = paired.items + 2
    difference = worse - better
    return difference, math.sqrt(max(1e-12, worse + better - difference**2 / n)), n


def detectable_drop(paired: Paired, alpha: float = ALPHA, power: float = POWER) -> float:
    """The smallest true drop that a one-sided McNemar test on so many items shows with ``power``.

    Connor's formula (Biometrics 1987;43:207), z_alpha sqrt(d) + z_beta sqrt(d - drop^2) = drop sqrt(n),
    solved for the drop. The discordance d is the observed share of flips, (flips + 1) / (items + 2), or
    the drop itself where that is more. 1 when no drop could be shown.
    """
    observed = (paired.flips_to_bad + paired.flips_to_good + 1) / (paired.items + 2)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if _items_for(middle, max(observed, middle), alpha, power) <= paired.items:
            high = middle
        else:
            low = middle
    return high


def items_that_decide(
    paired: Paired, margin: float, alpha: float = ALPHA, power: float = POWER
) -> int | None:
    """Items that would show the drop to be within ``margin`` with ``power``, if it is what was observed.

    (z_alpha + z_beta)^2 (d - drop^2) / (margin - drop)^2, the Wald sample size for a difference of matched
    proportions, with the adjusted discordance d. None where the observed drop is not within the margin:
    more items would rather show that it is not.
    """
    if paired.drop >= margin:
        return None
    _, spread, n = _adjusted(paired)
    z = _NORMAL.inv_cdf(1 - alpha) + _NORMAL.inv_cdf(power)
    distance = margin - max(0.0, paired.drop)
    return max(paired.items + 1, math.ceil((z * spread / math.sqrt(n) / distance) ** 2))


def _items_for(drop: float, discordance: float, alpha: float, power: float) -> float:
    if drop <= 0:
        return math.inf
    z_alpha, z_beta = _NORMAL.inv_cdf(1 - alpha), _NORMAL.inv_cdf(power)
    spread = z_alpha * math.sqrt(discordance) + z_beta * math.sqrt(max(0.0, discordance - drop**2))
    return (spread / drop) ** 2


def mcnemar_p(to_wrong: int, to_right: int) -> float:
    """Two-sided exact McNemar test: probability of flips at least as one-sided as these."""
    n = to_wrong + to_right
    tail = math.fsum(math.comb(n, k) / 2**n for k in range(min(to_wrong, to_right) + 1))
    return min(1.0, 2 * tail)


def wilson_interval(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion (95 % two-sided by default)."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values: compared with alpha, they decide as Holm's procedure does."""
    adjusted: dict[str, float] = {}
    worst = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = worst
    return adjusted


def items_of_mean(distance: float, spread: float, items: int, level: float) -> int | None:
    """Items, of ``spread`` each, that show a mean to be ``distance`` within its limit; None if it is not."""
    if distance <= 0:
        return None
    z = _NORMAL.inv_cdf(1 - level) + _NORMAL.inv_cdf(POWER)
    return max(items + 1, math.ceil((z * spread / distance) ** 2))
