"""The gate must not let a worse variant through, nor pass one on too few items."""

import random

import pytest

from quantize.card import Card, Evaluation, Outcome, RoleEvaluation, TextEvaluation
from quantize.gate import QualityBudget, drop_upper_bound, judge, mcnemar_p, wilson_interval

TEXT = TextEvaluation(
    tokens=1000,
    perplexity=2.0,
    reference_perplexity=2.0,
    delta_log_perplexity=0.0,
    delta_log_perplexity_se=0.001,
    kl_mean=0.01,
    kl_p99=0.1,
    kl_vocabulary=128,
    top1_agreement=0.99,
)


def role_evaluation(items: int, right: int, to_wrong: int, to_right: int) -> RoleEvaluation:
    return RoleEvaluation(
        text=TEXT,
        items=items,
        correct=right - to_wrong + to_right,
        reference_correct=right,
        flips_to_wrong=to_wrong,
        flips_to_right=to_right,
        same_answer=items - to_wrong - to_right,
        mcnemar_p=mcnemar_p(to_wrong, to_right),
    )


def card(evaluation: RoleEvaluation | None, bits: int = 4, variant: str = "int4") -> Card:
    measured = None
    if evaluation is not None:
        measured = Evaluation(roles={"core": evaluation}, text=TEXT, tasks_sha256="0", engine={})
    return Card(
        model="m",
        variant=variant,
        reference="bf16",
        scheme="w4a16-g64",
        method="gptq",
        weight_bits=bits,
        module_bits={},
        weight_bytes=1,
        kv_bytes_per_token=1,
        max_model_len=64,
        versions={},
        created="",
        files={},
        evaluation=measured,
    )


@pytest.mark.parametrize(
    ("evaluation", "outcome"),
    [
        (role_evaluation(1000, 950, 3, 2), Outcome.PASSED),
        (role_evaluation(1000, 950, 60, 5), Outcome.FAILED),
        (role_evaluation(40, 38, 0, 0), Outcome.NOT_ENOUGH_EVIDENCE),
        (role_evaluation(400, 380, 9, 3), Outcome.NOT_ENOUGH_EVIDENCE),
        (None, Outcome.NOT_ENOUGH_EVIDENCE),
    ],
)
def test_outcome_and_reason(evaluation: RoleEvaluation | None, outcome: Outcome) -> None:
    verdict = judge(card(evaluation), "core", QualityBudget(max_accuracy_drop=0.02))
    assert verdict.outcome == outcome, verdict
    assert verdict.reasons


def test_every_limit_must_hold() -> None:
    good = role_evaluation(2000, 1900, 2, 2)
    assert judge(card(good), "core", QualityBudget(max_kl=0.005)).outcome == Outcome.FAILED
    assert judge(card(good), "core", QualityBudget(min_accuracy=0.99)).outcome == Outcome.FAILED
    assert judge(card(good), "core", QualityBudget(min_weight_bits=8)).outcome == Outcome.FAILED
    assert judge(card(good, bits=8), "core", QualityBudget(min_weight_bits=8)).outcome == Outcome.PASSED


def test_the_reference_always_may_serve() -> None:
    verdict = judge(card(None, variant="bf16"), "core", QualityBudget(min_weight_bits=32))
    assert verdict.outcome == Outcome.PASSED


def test_upper_bound_covers_the_true_drop_about_as_often_as_it_says() -> None:
    """Simulated: 2 % true drop, 95 % one-sided bound; it may be short at most a little too often."""
    draw = random.Random(0)
    covered = 0
    for _ in range(600):
        flips = [draw.random() for _ in range(400)]
        to_wrong = sum(f < 0.03 for f in flips)
        to_right = sum(0.03 <= f < 0.04 for f in flips)
        covered += drop_upper_bound(role_evaluation(400, 380, to_wrong, to_right)) >= 0.02
    assert covered / 600 > 0.92


@pytest.mark.parametrize(("wrong", "right", "p"), [(0, 0, 1.0), (1, 1, 1.0), (5, 0, 0.0625), (10, 2, 0.0386)])
def test_mcnemar_matches_the_binomial_table(wrong: int, right: int, p: float) -> None:
    assert mcnemar_p(wrong, right) == pytest.approx(p, abs=1e-4)


def test_wilson_interval_matches_a_known_value() -> None:
    low, high = wilson_interval(90, 100)
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)
