"""A gate at 5 % is wrong at most 5 % of the time: enumerated for flips and shares, simulated for means.

What is summed up here does not share code with the tests that it checks: outcomes' probabilities are
scipy.stats', and every outcome of a region is counted.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from quantize.card import Paired
from quantize.gate.family import holm
from quantize.gate.means import critical_t, mean_difference, positive_mean
from quantize.gate.paired import (
    ALPHA,
    POWER,
    drop_p,
    flips_bound,
    flips_p,
    items_that_decide,
    mcnemar_p,
    provable_drop,
    score,
)
from quantize.gate.shares import items_of_share, share_lower_bound, share_p, share_power
from quantize.gate.unlabelled import choices_p, least_conversations

Array = NDArray[np.float64]
TOGETHER = 9
"""Gates that a family has where the first step of Holm's procedure is checked."""


@lru_cache
def passing(items: int, margin: float, alpha: float, most: int) -> tuple[int, ...]:
    """For c from 0 to ``most``, the largest b that passes, or -1."""
    found, b = [], -1
    for c in range(most + 1):
        while b + c < items and flips_p(items, b + 1, c, margin) <= alpha:
            b += 1
        found.append(min(b, items - c))
    return tuple(found)


def rate(items: int, drop: float, p01: Array, limits: tuple[int, ...]) -> Array:
    """(k,): how often an outcome passes at a true ``drop``, for every p01 of (k,). What has more gains than
    ``limits`` has places is counted as passing."""
    c = np.arange(len(limits))[None, :]
    p01 = p01[:, None]
    given = np.clip((p01 + drop) / (1 - p01), 0, 1)
    below = stats.binom.cdf(np.array(limits)[None, :], items - c, given)
    found: Array = (stats.binom.pmf(c, items, p01) * below).sum(axis=1)
    return found + stats.binom.sf(len(limits) - 1, items, p01[:, 0])


def searched(items: int, margin: float, largest: float) -> Array:
    """p01 from 0, where flips go one way only, to ``largest``, a tenth of a standard error apart."""
    end = math.asin(math.sqrt(min(largest, (1 - margin) / 2)))
    angles = np.linspace(0, end, math.ceil(end * 20 * math.sqrt(items)) + 2)
    return np.asarray(np.sin(angles) ** 2)


@pytest.mark.parametrize(
    ("items", "largest"), [(20, 0.5), (30, 0.5), (50, 0.5), (100, 0.5), (200, 0.2), (400, 0.06), (1000, 0.02)]
)
@pytest.mark.parametrize("margin", [0.005, 0.01, 0.02, 0.03, 0.05, 0.1])
def test_a_variant_at_its_margin_passes_at_most_as_often_as_stated(
    items: int, largest: float, margin: float
) -> None:
    """For every share of discordant answers, from flips in one direction only up to ``largest`` of gains."""
    most = min(items, math.ceil(items * largest + 8 * math.sqrt(items * largest * (1 - largest))))
    p01 = searched(items, margin, largest)
    for level in (ALPHA, ALPHA / TOGETHER) if items <= 100 else (ALPHA,):
        limits = passing(items, margin, level, most)
        assert rate(items, margin, p01, limits).max() <= level
        # A larger drop passes more rarely still.
        assert rate(items, 1.5 * margin, p01[p01 <= (1 - 1.5 * margin) / 2], limits).max() <= level


@pytest.mark.parametrize(
    ("items", "margin", "before"), [(200, 0.01, 0.134), (100, 0.02, 0.133), (300, 0.03, 0.112)]
)
def test_flips_in_one_direction_only_pass_rarely(items: int, margin: float, before: float) -> None:
    """Where the bound of Agresti and Min's adjusted Wald interval passes more than twice as often."""

    def wald(bad: int) -> bool:
        difference = bad + 0.5 - 0.5
        spread = math.sqrt(bad + 1 - difference**2 / (items + 2))
        return (difference + stats.norm.ppf(0.95) * spread) / (items + 2) <= margin

    often = stats.binom.pmf(np.arange(items + 1), items, margin)
    assert often[[wald(bad) for bad in range(items + 1)]].sum() == pytest.approx(before, abs=0.02)
    assert often[[flips_p(items, bad, 0, margin) <= ALPHA for bad in range(items + 1)]].sum() <= ALPHA


def test_zero_flips_of_a_hundred_do_not_show_two_percent() -> None:
    assert flips_p(100, 0, 0, 0.02) > 0.98**100 > ALPHA
    assert flips_bound(100, 0, 0, ALPHA) == pytest.approx(1 - ALPHA ** (1 / 100), abs=5e-4)


def test_the_score_is_tangos() -> None:
    """The interval of the score for 1 and 7 flips of 21 pairs (airway reactivity; Fagerland and others,
    Statistics in Medicine 2014;33:2850)."""
    one, seven = np.array([1.0]), np.array([7.0])
    assert float(score(one, seven, 21, -0.517)[0]) == pytest.approx(1.96, abs=0.02)
    assert float(score(one, seven, 21, -0.026)[0]) == pytest.approx(-1.96, abs=0.02)
    # Without a margin it is McNemar's statistic.
    assert float(score(seven, one, 21, 0.0)[0]) == pytest.approx(6 / math.sqrt(8))


@pytest.mark.parametrize("items", [20, 250])
def test_the_bound_and_the_p_value_are_one_test(items: int) -> None:
    for to_bad in range(5):
        for to_good in range(5):
            bound = flips_bound(items, to_bad, to_good, ALPHA)
            for margin in np.linspace(0.001, 0.4, 9):
                assert (flips_p(items, to_bad, to_good, float(margin)) <= ALPHA) == (margin >= bound - 1e-7)


def exact(items: int, margin: float) -> Array:
    """(k,) whether an outcome passes by Lloyd and Moldovan's test (Statistics in Medicine 2008;27:3540): the
    score's p-value at the likeliest p01 is the statistic of an exact test over all p01."""
    bad, good = outcomes(items)
    p01 = searched(items, margin, 0.5)
    mass = np.array([chances(items, q + margin, q) for q in p01])
    statistic = np.round(score(bad, good, items, margin), 9)
    likeliest = (1 - margin) / 2 * np.ones_like(bad)
    linear = (2 * items - bad + good) * margin - bad - good
    likeliest = (np.sqrt(linear**2 + 8 * items * good * margin * (1 - margin)) - linear) / (4 * items)
    nearest = np.abs(p01[:, None] - likeliest[None, :]).argmin(axis=0)
    estimated = np.round(tails(statistic, mass)[nearest, np.arange(len(bad))], 9)
    passes: Array = tails(estimated, mass).max(axis=0) <= ALPHA
    return passes


def outcomes(items: int) -> tuple[Array, Array]:
    bad, good = np.meshgrid(np.arange(items + 1.0), np.arange(items + 1.0), indexing="ij")
    inside = bad + good <= items
    return bad[inside], good[inside]


def chances(items: int, p10: float, p01: float) -> Array:
    bad, good = outcomes(items)
    counts = np.stack([bad, good, items - bad - good], axis=1)
    return np.asarray(stats.multinomial.pmf(counts, items, [p10, p01, max(0.0, 1 - p10 - p01)]))


def tails(statistic: Array, mass: Array) -> Array:
    """(q, k): probability of a statistic at most as large as each outcome's."""
    order = np.argsort(statistic, kind="stable")
    total = np.cumsum(mass[:, order], axis=1)
    last = np.searchsorted(statistic[order], statistic, side="right") - 1
    return np.asarray(total[:, last])


@pytest.mark.parametrize(("items", "margin"), [(30, 0.1), (50, 0.02), (50, 0.05), (80, 0.03), (100, 0.05)])
def test_the_power_is_that_of_the_best_exact_test(items: int, margin: float) -> None:
    bad, good = outcomes(items)
    limits = np.array(passing(items, margin, ALPHA, items))
    ours = bad <= limits[good.astype(int)]
    best = exact(items, margin)
    for gains in (0.0, 0.0025, 0.01, 0.03, 0.1):
        for drop in (0.0, margin / 4):
            chance = chances(items, gains + drop, gains)
            assert chance[ours].sum() > chance[best].sum() - 0.05


def test_of_a_family_at_its_limits_any_passes_at_most_as_often_as_stated() -> None:
    """Simulated: eight variants, each exactly at its limit, whose answers depend on one another's."""
    draw, margin, wrong, runs = np.random.default_rng(3), 0.02, 0, 2000
    for _ in range(runs):
        hard = draw.random(400)  # the same items are hard for all
        own = draw.random((8, 400))
        flips = np.where(draw.random((8, 400)) < 0.7, hard, own)
        bad, good = (flips < 0.03).sum(axis=1), ((flips >= 0.03) & (flips < 0.04)).sum(axis=1)
        p_values = {str(i): flips_p(400, int(bad[i]), int(good[i]), margin) for i in range(8)}
        wrong += min(holm(p_values).values()) <= ALPHA
    assert wrong / runs <= ALPHA


def paired(items: int, to_bad: int, to_good: int, good: int) -> Paired:
    return Paired(
        items=items,
        good=good - to_bad + to_good,
        reference_good=good,
        flips_to_bad=to_bad,
        flips_to_good=to_good,
        mcnemar_p=mcnemar_p(to_bad, to_good),
    )


def power(items: int, drop: float, p01: float, margin: float) -> float:
    most = math.ceil(items * p01 + 8 * math.sqrt(items * p01) + 8)
    return float(rate(items, drop, np.array([p01]), passing(items, margin, ALPHA, most))[0])


@pytest.mark.parametrize(("to_bad", "to_good"), [(5, 3), (2, 2), (20, 18)])
def test_the_items_that_decide_decide_as_often_as_stated(to_bad: int, to_good: int) -> None:
    sample, margin = paired(300, to_bad, to_good, 280), 0.05
    more = items_that_decide(sample, margin)
    assert more is not None
    flips, drop = (to_bad + to_good + 1) / 302, (to_bad - to_good) / 300
    assert more == 301 or power(more, drop, (flips - drop) / 2, margin) == pytest.approx(POWER, abs=0.06)
    assert items_that_decide(paired(300, 15, 0, 280), margin) is None


@pytest.mark.parametrize("flips", [3, 11, 40])
def test_the_drop_that_is_ruled_out_is_as_often_as_stated(flips: int) -> None:
    sample = paired(400, flips, flips, 380)
    margin = provable_drop(sample)
    share = (2 * flips + 1) / 402
    assert power(400, 0.0, share / 2, round(margin, 4)) == pytest.approx(POWER, abs=0.06)
    assert drop_p(sample, margin) < ALPHA


@pytest.mark.parametrize("least", [0.05, 0.5, 0.8, 0.9, 0.95, 0.99])
def test_a_share_at_its_limit_passes_at_most_as_often_as_stated(least: float) -> None:
    for items in (20, 50, 100, 200, 400, 1000):
        assert share_power(least, least, items, ALPHA) <= ALPHA
        assert share_power(least - 0.01, least, items, ALPHA) <= ALPHA


def test_the_bound_of_a_share_is_clopper_and_pearsons() -> None:
    """81 of 263 and 15 of 148, two-sided 95 % (Newcombe, Statistics in Medicine 1998;17:857)."""
    assert share_lower_bound(81, 263, 0.025) == pytest.approx(0.2527, abs=1e-4)
    assert share_lower_bound(15, 148, 0.025) == pytest.approx(0.0578, abs=1e-4)
    assert share_lower_bound(0, 200) == 0.0
    assert share_p(81, 263, share_lower_bound(81, 263)) == pytest.approx(ALPHA)
    more = items_of_share(0.97, 0.95, 300, ALPHA)
    assert more is not None
    assert share_power(0.97, 0.95, more, ALPHA) == pytest.approx(POWER, abs=0.03)


Draws = Callable[[np.random.Generator, int, int], Array]
SKEWED: dict[str, Draws] = {
    "log-normal 0.5": lambda draw, runs, count: draw.lognormal(-0.125, 0.5, (runs, count)),
    "log-normal 0.75": lambda draw, runs, count: draw.lognormal(-0.28125, 0.75, (runs, count)),
    "log-normal 1": lambda draw, runs, count: draw.lognormal(-0.5, 1.0, (runs, count)),
    "log-normal 1.5": lambda draw, runs, count: draw.lognormal(-1.125, 1.5, (runs, count)),
    "exponential": lambda draw, runs, count: draw.gamma(1.0, 1.0, (runs, count)),
    "gamma 0.25": lambda draw, runs, count: draw.gamma(0.25, 4.0, (runs, count)),
    "normal": lambda draw, runs, count: draw.normal(1.0, 0.3, (runs, count)),
}
"""Losses per conversation, all with a mean of 1."""


@pytest.mark.parametrize("name", SKEWED)
@pytest.mark.parametrize("count", [20, 40, 80, 240])
def test_a_mean_at_its_limit_passes_at_most_as_often_as_stated(name: str, count: int) -> None:
    """Simulated, 6,000 runs: 5.9 % is three standard errors above 5 %, and 1 % above 0.56 %."""
    draws = SKEWED[name](np.random.default_rng(count), 6000, count)
    means, errors = draws.mean(axis=1), draws.std(axis=1, ddof=1) / math.sqrt(count)
    skews = stats.skew(draws, axis=1, bias=False)
    for family, level, most in ((1, ALPHA, 0.0585), (TOGETHER, ALPHA / TOGETHER, 0.0085)):
        positive = [positive_mean(m, e, count).p(1.0) <= level for m, e in zip(means, errors, strict=True)]
        assert np.mean(positive) <= most, (family, "KL")
        signed = [
            mean_difference(m, e, count, g).p(1.0) <= level
            for m, e, g in zip(means, errors, skews, strict=True)
        ]
        assert np.mean(signed) <= most, (family, "difference")


def test_the_ordinary_t_test_would_pass_far_more_often() -> None:
    draws = SKEWED["log-normal 1"](np.random.default_rng(0), 6000, 20)
    t = (draws.mean(axis=1) - 1) / (draws.std(axis=1, ddof=1) / math.sqrt(20))
    assert stats.t.cdf(t, 19).__le__(ALPHA).mean() > 0.15


def test_a_mean_well_within_its_limit_passes() -> None:
    draws = SKEWED["log-normal 1"](np.random.default_rng(1), 1000, 80)
    means, errors = draws.mean(axis=1), draws.std(axis=1, ddof=1) / math.sqrt(80)
    passed = [positive_mean(m, e, 80).p(3.0) <= ALPHA for m, e in zip(means, errors, strict=True)]
    assert np.mean(passed) > 0.9


@pytest.mark.parametrize(("mean", "error", "count"), [(0.01, 0.001, 80), (0.01, 0.004, 20), (0.5, 0.2, 25)])
@pytest.mark.parametrize("alpha", [ALPHA, ALPHA / 2, ALPHA / TOGETHER])
def test_the_bound_and_the_p_value_of_a_mean_are_one_test(
    mean: float, error: float, count: int, alpha: float
) -> None:
    for estimate in (positive_mean(mean, error, count), mean_difference(mean, error, count, 3.0)):
        bound = estimate.upper_bound(alpha)
        assert estimate.p(bound) == pytest.approx(alpha)
        assert estimate.p(bound + error / 100) < alpha < estimate.p(bound - error / 100)
        more = estimate.sequences_that_decide(mean + error, alpha)
        assert more is not None
        assert more > count


def test_without_skewness_it_is_students_t() -> None:
    table = [(0.025, 5, -2.5706), (0.025, 10, -2.2281), (0.05, 30, -1.6973)]
    for alpha, freedom, value in table:
        assert critical_t(alpha, 0.0, freedom + 1) == pytest.approx(value, abs=1e-4)


LENGTHS = {"alike": [12], "mixed": [3, 10, 60, 96], "half of them a word": [1, 2, 96, 96]}
"""Tokens of answers."""


def other_choices(
    draw: np.random.Generator, share: float, runs: int, count: int, alike: float, lengths: list[int]
) -> Array:
    """(runs, count): each conversation's share of tokens with another likeliest one, ``share`` on average.
    ``alike`` is the sum of a beta distribution's parameters: conversations are all or nothing where it is
    small, and all the same where it is infinite."""
    tokens = draw.choice(lengths, (runs, count))
    own = (
        np.full((runs, count), share)
        if math.isinf(alike)
        else draw.beta(share * alike, (1 - share) * alike, (runs, count))
    )
    return np.asarray(draw.binomial(tokens, own) / tokens)


@pytest.mark.parametrize("agreement", [0.8, 0.88, 0.95])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_first_choices_at_their_limit_pass_at_most_as_often_as_stated(agreement: float, lengths: str) -> None:
    """Simulated, 2,000 runs of every spread over conversations: 6.2 % is two and a half standard errors above
    5 %. From the fewest conversations on that are accepted."""
    draw = np.random.default_rng(5)
    least = least_conversations(agreement)
    for count in (least, 2 * least, 252):
        for alike in (0.1, 0.3, 1.0, 3.0, 10.0, math.inf):
            others = other_choices(draw, 1 - agreement, 2000, count, alike, LENGTHS[lengths])
            means, errors = others.mean(axis=1), others.std(axis=1, ddof=1) / math.sqrt(count)
            p_values = [choices_p(m, e, count, agreement) for m, e in zip(means, errors, strict=True)]
            assert np.mean(np.array(p_values) <= ALPHA) <= 0.062, (count, alike)
            assert np.mean(np.array(p_values) <= ALPHA / TOGETHER) <= 0.0105, (count, alike)


def test_weighted_by_tokens_they_would_pass_too_often() -> None:
    draw, count, share = np.random.default_rng(6), 80, 0.05
    tokens = draw.choice([1, 2, 96, 96], (2000, count))
    others = draw.binomial(tokens, draw.beta(share * 0.1, (1 - share) * 0.1, (2000, count)))
    means = others.sum(axis=1) / tokens.sum(axis=1)
    rest = others - means[:, None] * tokens
    errors = np.sqrt((rest**2).sum(axis=1) * count / (count - 1)) / tokens.sum(axis=1)
    p_values = [choices_p(m, e, count, 1 - share) for m, e in zip(means, errors, strict=True)]
    assert np.mean(np.array(p_values) <= ALPHA) > 0.07


def test_first_choices_well_within_their_limit_pass() -> None:
    """As a model of 135 M parameters was in 8 bits: 7.3 % of first choices are others."""
    draw = np.random.default_rng(7)
    others = other_choices(draw, 0.073, 1000, 96, 35.0, [40, 64, 64])
    means, errors = others.mean(axis=1), others.std(axis=1, ddof=1) / math.sqrt(96)
    passed = [choices_p(m, e, 96, 0.88) <= ALPHA / TOGETHER for m, e in zip(means, errors, strict=True)]
    assert np.mean(passed) > 0.9


def test_no_other_choice_at_all_shows_no_more_than_its_conversations() -> None:
    assert choices_p(0.0, 0.0, 40, 0.9) == pytest.approx(0.9**40)
    assert choices_p(0.2, 0.0, 40, 0.9) == 1.0, "all conversations alike, and beyond"
    assert choices_p(0.0, 0.0, least_conversations(0.9) - 1, 0.9) == 1.0


def test_changed_answers_at_their_limit_beyond_the_noise_floor_pass_at_most_as_often_as_stated() -> None:
    """Simulated: the reference changes some of its own answers, and the variant rather those."""
    draw, runs, items = np.random.default_rng(8), 2000, 96
    for own, most in ((0.0, 0.6), (0.02, 0.6), (0.1, 0.3), (0.3, 0.1)):
        hard, lucky = draw.random((2, runs, items))
        alike = draw.random((runs, items)) < 0.5
        first, variant = hard >= own, np.where(alike, hard, lucky) >= own + most
        bad, good = (first & ~variant).sum(axis=1), (~first & variant).sum(axis=1)
        passed = [flips_p(items, int(b), int(g), most) <= ALPHA for b, g in zip(bad, good, strict=True)]
        assert np.mean(passed) <= 0.059, (own, most)
