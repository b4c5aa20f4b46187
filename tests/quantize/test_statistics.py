"""KL and perplexity from partial score lists: exact where they can be, a lower bound elsewhere."""

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.evaluate.scores import Scored, from_rows, from_table
from quantize.evaluate.statistics import (
    clustered_mean,
    clustered_skewness,
    compare_tokens,
    kl_interval,
    kl_lower_bound,
    kl_per_token,
    percentile,
)


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


def scored(rows: list[list[float]], tokens: list[int]) -> Scored:
    return from_table(np.log(np.array(rows)).astype(np.float32), tokens)


def test_reference_against_itself_is_zero() -> None:
    one = scored([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]], [0, 2])
    figures = compare_tokens([one], [one])
    assert figures.kl_mean == 0.0
    assert figures.kl_exact
    assert figures.top1_agreement == 1.0
    assert figures.delta_log_perplexity == 0.0
    assert figures.perplexity == pytest.approx(math.exp(-(math.log(0.2) + math.log(0.8)) / 2))
    assert figures.kl_interval is None  # one conversation says nothing about others


def test_worse_variant_shows_in_every_figure() -> None:
    sharp, flat = [0.1, 0.1, 0.8], [0.4, 0.3, 0.3]
    before = [scored([sharp, sharp], [0, 2]), scored([sharp, sharp], [2, 2])]
    after = [scored([flat, flat], [0, 2]), scored([flat, flat], [2, 2])]
    figures = compare_tokens(before, after)
    assert figures.kl_mean == pytest.approx(exact_kl(sharp, flat), rel=1e-5)
    assert figures.perplexity != figures.reference_perplexity
    assert figures.top1_agreement == 0.0
    assert (figures.tokens, figures.sequences, figures.kl_vocabulary) == (4, 2, 3)


@given(distribution, distribution, st.integers(2, 5))
def test_rows_of_the_likeliest_give_the_same_bound_as_mappings(
    p: list[float], q: list[float], top: int
) -> None:
    def likeliest(values: list[float]) -> dict[int, float]:
        best = sorted(range(6), key=lambda i: -values[i])[:top]
        return {i: math.log(values[i]) for i in best}

    before, after = likeliest(p), likeliest(q)
    came = next(iter(before.keys() & after.keys()), None)
    if came is None:
        return
    rows = from_rows([before], [came]), from_rows([after], [came])
    (bound,) = kl_per_token(*rows)
    assert bound == pytest.approx(kl_lower_bound(before, after), abs=1e-5)
    (mixed,) = kl_per_token(scored([p], [0]), rows[1])
    assert mixed <= exact_kl(p, q) + 1e-5


def test_scores_are_kept_as_they_are() -> None:
    whole = scored([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]], [0, 2])
    some = from_rows([{5: -0.1, 7: -3.0}, {2: -0.5}], [5, 2])
    for one in (whole, some):
        back = Scored.from_json(json.loads(json.dumps(one.to_json())))
        assert [back.row(i) for i in range(2)] == [one.row(i) for i in range(2)]
        assert back.came.tolist() == one.came.tolist()
        assert back.whole == one.whole
    assert some.row(1) == {2: -0.5}
    assert some.top1().tolist() == [5, 2]


def test_interval_of_clusters_covers_at_least_as_often_as_it_says() -> None:
    """Simulated: conversations differ, tokens within one are alike."""
    draw, covered = random.Random(1), 0
    for _ in range(400):
        lengths = [draw.randint(2, 12) for _ in range(25)]
        totals = [length * draw.expovariate(1.0) for length in lengths]
        between = kl_interval(*clustered_mean(totals, lengths), 25)
        assert between is not None
        covered += between[0] <= 1.0 <= between[1]
    assert covered / 400 > 0.92


def test_skewness_is_of_conversations() -> None:
    """The adjusted Fisher-Pearson coefficient, as spreadsheets have it."""
    assert clustered_skewness([3.0, 4.0, 5.0, 2.0, 3.0, 4.0, 5.0, 6.0, 4.0, 7.0], [1] * 10) == pytest.approx(
        0.359543, abs=1e-6
    )
    assert clustered_skewness([2.0, 4.0, 6.0], [1, 2, 3]) == 0.0
    assert clustered_skewness([1.0, 5.0], [1, 1]) == 0.0


def test_percentile_is_nearest_rank() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
