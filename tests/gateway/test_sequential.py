"""The statistics against simulation: what they promise is what happens."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.quality.sequential import (
    Cusum,
    Decision,
    Rates,
    Sprt,
    confidence_sequence,
    corrected_share,
    threshold,
)

RATES = Rates(0.05, 0.2)


def answers_until(share: float, h: float, rng: random.Random, most: int = 10**9) -> int:
    cusum = Cusum(RATES)
    for number in range(1, most):
        if cusum.add(rng.random() < share) >= h:
            return number
    return most


def test_false_alarms_come_as_rarely_as_promised() -> None:
    rng = random.Random(1)
    for promised in (100, 1000):
        h = threshold(promised)
        mean = sum(answers_until(RATES.tolerated, h, rng) for _ in range(60)) / 60
        assert mean > promised, (promised, mean)


def test_harm_is_seen_soon() -> None:
    rng = random.Random(2)
    h = threshold(1e6)
    for share, most in ((0.9, 15), (0.5, 40), (0.2, 180)):
        seen = sorted(answers_until(share, h, rng) for _ in range(101))[50]
        assert seen <= most, (share, seen)


def test_a_decision_is_wrong_no_more_often_than_promised() -> None:
    rng = random.Random(3)

    def decide(share: float) -> Decision:
        test = Sprt(RATES, alpha=0.05, beta=0.05)
        while (decision := test.add(rng.random() < share)) is None:
            pass
        return decision

    healthy = sum(decide(RATES.tolerated) is Decision.HEALTHY for _ in range(600)) / 600
    harmed = sum(decide(RATES.alarming) is Decision.HARMED for _ in range(600)) / 600
    assert healthy > 0.93
    assert harmed > 0.93


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_an_interval_holds_at_every_look(share: float) -> None:
    rng = random.Random(4)
    missed = 0
    for _ in range(200):
        bad = 0
        for number in range(1, 400):
            bad += rng.random() < share
            if number % 7 == 0:
                low, high = confidence_sequence(bad, number, alpha=0.1)
                if not low <= share <= high:
                    missed += 1
                    break
    assert missed / 200 <= 0.1


@given(st.integers(0, 500), st.integers(0, 500))
def test_an_interval_is_around_what_was_seen_and_narrows(bad: int, good: int) -> None:
    low, high = confidence_sequence(bad, bad + good)
    assert 0 <= low <= high <= 1
    if bad + good:
        assert low <= bad / (bad + good) <= high
        lower, higher = confidence_sequence(10 * bad, 10 * (bad + good))
        assert higher - lower <= high - low + 1e-9


def test_no_answers_say_nothing() -> None:
    assert confidence_sequence(0, 0) == (0.0, 1.0)


def test_a_judges_errors_are_taken_out() -> None:
    rng = random.Random(5)
    true, sensitivity, specificity = 0.12, 0.7, 0.85
    held, shares = 0, []
    for _ in range(300):
        found = sum(
            rng.random() < (sensitivity if rng.random() < true else 1 - specificity) for _ in range(800)
        )
        se = sum(rng.random() < sensitivity for _ in range(200)) / 200
        sp = sum(rng.random() < specificity for _ in range(200)) / 200
        corrected = corrected_share(found, 800, se, sp, (200, 200))
        assert corrected is not None
        shares.append(corrected.share)
        held += corrected.low <= true <= corrected.high
    assert abs(sum(shares) / 300 - true) < 0.01
    assert held / 300 > 0.9


def test_a_judge_that_guesses_says_nothing() -> None:
    assert corrected_share(50, 100, 0.5, 0.5, (100, 100)) is None
    assert corrected_share(0, 0, 0.9, 0.9, (100, 100)) is None
    assert corrected_share(5, 10, 0.9, 0.9, (0, 100)) is None


@pytest.mark.parametrize(("tolerated", "alarming"), [(0, 0.2), (0.2, 0.2), (0.3, 0.2), (0.2, 1), (-1, 2)])
def test_rates_must_be_rates(tolerated: float, alarming: float) -> None:
    with pytest.raises(ValueError, match="must be shares"):
        Rates(tolerated, alarming)


def test_evidence_is_the_log_likelihood_ratio() -> None:
    assert RATES.evidence(True) == pytest.approx(math.log(4))
    assert RATES.evidence(False) == pytest.approx(math.log(0.8 / 0.95))
