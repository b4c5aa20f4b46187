"""Token figures from what engines said of each token: exact KL, or both of its bounds."""

import json
import math
import random

import numpy as np
import pytest

from quantize.card import TextEvaluation
from quantize.evaluate.scores import Scored, from_rows
from quantize.evaluate.statistics import (
    clustered_mean,
    clustered_skewness,
    compare_tokens,
    kl_interval,
    percentile,
)
from quantize.gate.limit import MOST_NATS, NOT_FINITE


def exact_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def scored(rows: list[list[float]], tokens: list[int], reference: list[list[float]] | None = None) -> Scored:
    """As an engine with our route would say it."""
    before = reference or rows
    kl = np.array([exact_kl(p, q) for p, q in zip(before, rows, strict=True)])
    return Scored(
        came=np.log([row[token] for row, token in zip(rows, tokens, strict=True)]),
        top1=np.array([int(np.argmax(row)) for row in rows], np.int32),
        vocabulary=len(rows[0]),
        kl=kl,
        kl_upper=kl,
        reference_top1=np.array([int(np.argmax(row)) for row in before], np.int32),
    )


def test_reference_against_itself_is_zero() -> None:
    one = scored([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]], [0, 2])
    figures = compare_tokens([one], [one])
    assert figures.kl_mean == figures.kl_upper == 0.0
    assert figures.kl_exact
    assert figures.top1_agreement == 1.0
    assert figures.delta_log_perplexity == 0.0
    assert figures.perplexity == pytest.approx(math.exp(-(math.log(0.2) + math.log(0.8)) / 2))
    assert figures.kl_interval is None  # one conversation says nothing about others


def test_worse_variant_shows_in_every_figure() -> None:
    sharp, flat = [0.1, 0.1, 0.8], [0.4, 0.3, 0.3]
    before = [scored([sharp, sharp], [0, 2]), scored([sharp, sharp], [2, 2])]
    after = [
        scored([flat, flat], [0, 2], [sharp, sharp]),
        scored([flat, flat], [2, 2], [sharp, sharp]),
    ]
    figures = compare_tokens(before, after)
    assert figures.kl_mean == figures.kl_upper == pytest.approx(exact_kl(sharp, flat))
    assert figures.kl_se == figures.kl_upper_se
    assert figures.perplexity != figures.reference_perplexity
    assert figures.top1_agreement == 0.0
    assert (figures.tokens, figures.sequences, figures.kl_vocabulary) == (4, 2, 3)


def test_bounds_are_told_apart() -> None:
    one = scored([[0.2, 0.8], [0.5, 0.5]], [0, 1])
    within = Scored(one.came, one.top1, 2, np.array([0.1, 0.2]), np.array([0.3, 0.6]), one.top1)
    figures = compare_tokens([one, one], [within, within])
    assert (figures.kl_mean, figures.kl_upper) == (pytest.approx(0.15), pytest.approx(0.45))
    assert not figures.kl_exact


def test_a_kl_that_nothing_bounds_is_infinite_on_the_card_and_read_back() -> None:
    one = scored([[0.2, 0.8]], [0])
    above = Scored(one.came, one.top1, 2, np.array([0.1]), np.array([math.inf]), one.top1)
    figures = compare_tokens([one, one], [one, above])
    assert (figures.kl_upper, figures.kl_upper_se) == (math.inf, math.inf)
    assert figures.kl_mean == pytest.approx(0.05)
    assert not figures.kl_exact
    assert TextEvaluation.model_validate_json(figures.model_dump_json()) == figures


def test_what_was_scored_without_a_reference_is_not_compared() -> None:
    alone = Scored(np.zeros(2), np.zeros(2, np.int32), 5)
    with pytest.raises(ValueError, match="scored without a reference"):
        compare_tokens([alone], [alone])


def test_scores_are_kept_as_they_are() -> None:
    exact = scored([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]], [0, 2])
    bounded = Scored(exact.came, exact.top1, 64, exact.came, exact.came + 1, exact.top1, "digest")
    alone = Scored(exact.came, exact.top1, 3)
    for one in (exact, bounded, alone):
        back = Scored.from_json(json.loads(json.dumps(one.to_json())))
        assert back.exact == one.exact
        assert (back.vocabulary, back.against, len(back)) == (one.vocabulary, one.against, 2)
        for name in ("came", "top1", "kl", "kl_upper", "reference_top1"):
            ours, theirs = getattr(one, name), getattr(back, name)
            assert (ours is None and theirs is None) or ours.tolist() == theirs.tolist()


def test_rows_of_some_tokens_are_kept_with_their_ids() -> None:
    some = from_rows([{5: -0.1, 7: -3.0}, {2: -0.5}])
    assert [some.row(0), some.row(1)] == [{5: -0.1, 7: -3.0}, {2: -0.5}]
    assert some.top1().tolist() == [5, 2]
    assert some.of([7, 2]).tolist() == [-3.0, -0.5]


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


def flat(kl: float, came: float, tokens: int = 5) -> Scored:
    """The same figures of every token."""
    kls, top = np.full(tokens, kl), np.zeros(tokens, np.int32)
    return Scored(np.full(tokens, came), top, 100, kls, kls, top)


@pytest.mark.parametrize(("kl", "came"), [(math.nan, math.nan), (math.inf, -math.inf), (0.5, -math.inf)])
def test_scores_that_are_not_finite_are_told_from_those_that_are(kl: float, came: float) -> None:
    """They stay so in a journal, and a card can say them."""
    good, bad = flat(0.01, -1.0), Scored.from_json(flat(kl, came).to_json())
    assert good.finite
    assert not bad.finite
    of_variant = compare_tokens([good] * 30, [good] * 29 + [bad])
    assert of_variant.kl_mean == of_variant.delta_log_perplexity == NOT_FINITE
    assert of_variant.reference_perplexity == pytest.approx(math.e)
    of_reference = compare_tokens([good] * 29 + [bad], [good] * 30)
    assert of_reference.delta_log_perplexity == -NOT_FINITE
    for text in (of_variant, of_reference):
        assert TextEvaluation.model_validate_json(text.model_dump_json()) == text


def test_tokens_that_are_hardly_possible_have_a_perplexity() -> None:
    figures = compare_tokens([flat(0.0, -1.0)] * 30, [flat(800.0, -800.0)] * 30)
    assert figures.kl_mean == pytest.approx(800)
    assert figures.delta_log_perplexity == pytest.approx(799)
    assert figures.perplexity == math.exp(MOST_NATS)
