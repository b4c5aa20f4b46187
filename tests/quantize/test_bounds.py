"""Bounds of the KL from some tokens' probabilities: they hold, and are infinite where nothing bounds it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from quantize.evaluate.bounds import kl_bounds

SOFTCAP = 4.0
logits = st.lists(st.floats(-SOFTCAP, SOFTCAP), min_size=12, max_size=12).map(np.array)


def log_softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = values - np.log(np.exp(values).sum())
    return result


def likeliest(values: NDArray[np.float64], top: int) -> dict[int, float]:
    return {int(token): float(values[token]) for token in np.argsort(-values)[:top]}


def exact(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    return float((np.exp(p) * (p - q)).sum())


def test_of_what_is_no_number_there_are_no_bounds() -> None:
    assert all(map(math.isnan, kl_bounds({1: -0.1, 2: -3.0}, {1: -0.1, 2: math.nan})))


@given(logits, logits, st.integers(1, 11), st.integers(1, 11))
def test_the_bounds_hold_of_each_side_s_likeliest(
    a: NDArray[np.float64], b: NDArray[np.float64], top: int, other: int
) -> None:
    """What servers with the V1 model runner tell."""
    p, q = log_softmax(a), log_softmax(b)
    before, after = likeliest(p, top), likeliest(q, other)
    lower, upper = kl_bounds(before, after, min(before.values()), softcap=SOFTCAP)
    assert lower - 1e-9 <= exact(p, q) <= upper + 1e-9
    assert kl_bounds(before, after, min(before.values())) == (lower, math.inf)


@given(logits, logits, st.integers(1, 11), st.integers(0, 11))
def test_the_bounds_hold_of_the_reference_s_likeliest(
    a: NDArray[np.float64], b: NDArray[np.float64], top: int, came: int
) -> None:
    """What servers with the V2 model runner tell: the same tokens, and the one that came."""
    p, q = log_softmax(a), log_softmax(b)
    before = likeliest(p, top)
    cap = min(before.values())
    before[came] = float(p[came])
    lower, upper = kl_bounds(before, {token: float(q[token]) for token in before}, cap, softcap=SOFTCAP)
    assert lower - 1e-9 <= exact(p, q) <= upper + 1e-9


@given(logits, logits)
def test_the_whole_vocabulary_leaves_nothing_to_bound(a: NDArray[np.float64], b: NDArray[np.float64]) -> None:
    p, q = log_softmax(a), log_softmax(b)
    lower, upper = kl_bounds(likeliest(p, 12), likeliest(q, 12), vocabulary=12)
    assert lower == upper == pytest.approx(max(0.0, exact(p, q)), abs=1e-9)


def test_without_a_cap_on_logits_the_true_divergence_can_be_as_large_as_one_likes() -> None:
    """The known tokens say nothing of it: so no finite number is an upper bound."""
    p = np.log([0.5, 0.4, 0.05, 0.05])
    told = {0: float(p[0]), 1: float(p[1])}
    for tiny in (1e-2, 1e-9, 1e-300):
        q = np.log([0.5, 0.4, 0.1 - tiny, tiny])
        lower, upper = kl_bounds(told, {0: float(q[0]), 1: float(q[1])}, float(p[1]))
        assert lower == pytest.approx(0, abs=1e-9)
        assert upper == math.inf
        assert exact(p, q) > 0.05 * math.log(0.05 / tiny) - 0.05


def test_a_small_remainder_makes_a_useful_bound() -> None:
    p = log_softmax(np.array([12.0, 8.0, *([-6.0] * 100)]))
    before = likeliest(p, 2)
    lower, upper = kl_bounds(before, before, min(before.values()), softcap=15.0)
    assert lower == pytest.approx(0, abs=1e-9)
    assert upper < 1e-3
