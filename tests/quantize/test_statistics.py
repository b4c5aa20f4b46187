"""KL and perplexity from partial score lists: exact where they can be, a lower bound elsewhere."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.evaluate.statistics import compare_tokens, kl_lower_bound, percentile


def logs(probabilities: list[float]) -> dict[int, float]:
    return {i: math.log(p) for i, p in enumerate(probabilities)}


def exact_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


distribution = st.lists(st.floats(0.01, 1.0), min_size=6, max_size=6).map(lambda w: [x / sum(w) for x in w])


@given(distribution, distribution)
def test_whole_vocabulary_gives_the_exact_kl(p: list[float], q: list[float]) -> None:
    assert kl_lower_bound(logs(p), logs(q)) == pytest.approx(exact_kl(p, q), abs=1e-9)


@given(distribution, distribution, st.integers(1, 5))
def test_fewer_tokens_give_a_lower_bound(p: list[float], q: list[float], top: int) -> None:
    def keep(values: list[float]) -> dict[int, float]:
        best = sorted(range(6), key=lambda i: -values[i])[:top]
        return {i: math.log(values[i]) for i in best}

    assert kl_lower_bound(keep(p), keep(q)) <= exact_kl(p, q) + 1e-9


def test_reference_against_itself_is_zero() -> None:
    tokens, scores = [[0, 2]], [[logs([0.2, 0.3, 0.5]), logs([0.1, 0.1, 0.8])]]
    figures = compare_tokens(tokens, scores, scores, 3)
    assert figures.kl_mean == 0.0
    assert figures.top1_agreement == 1.0
    assert figures.delta_log_perplexity == 0.0
    assert figures.perplexity == pytest.approx(math.exp(-(math.log(0.2) + math.log(0.8)) / 2))


def test_worse_variant_shows_in_every_figure() -> None:
    tokens = [[0, 2], [2, 2]]
    sharp, flat = logs([0.1, 0.1, 0.8]), logs([0.4, 0.3, 0.3])
    figures = compare_tokens(tokens, [[sharp] * 2] * 2, [[flat] * 2] * 2, 3)
    assert figures.kl_mean == pytest.approx(exact_kl([0.1, 0.1, 0.8], [0.4, 0.3, 0.3]))
    assert figures.perplexity != figures.reference_perplexity
    assert figures.top1_agreement == 0.0


def test_percentile_is_nearest_rank() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
