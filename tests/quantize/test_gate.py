"""The gate must not let a worse variant through, nor pass one on too few items."""

import math

import pytest
from pydantic import ValidationError

from quantize.card import Card, Evaluation, LongContext, Outcome, Paired, RoleEvaluation, TextEvaluation
from quantize.gate.family import holm
from quantize.gate.judgement import QualityBudget, gate_p_values, judge
from quantize.gate.limit import NOT_FINITE, LimitTest, not_finite
from quantize.gate.means import ClusteredMean
from quantize.gate.paired import drop_p, drop_upper_bound, mcnemar_p
from quantize.gate.shares import wilson_interval

TEXT = TextEvaluation(
    tokens=1000,
    perplexity=2.0,
    reference_perplexity=2.0,
    delta_log_perplexity=0.0,
    delta_log_perplexity_se=0.001,
    delta_log_perplexity_skewness=1.0,
    kl_mean=0.01,
    kl_se=0.001,
    kl_interval=(0.008, 0.012),
    sequences=80,
    kl_p99=0.1,
    kl_vocabulary=128,
    kl_exact=True,
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


def paired(items: int, to_bad: int, to_good: int, reference_good: int) -> Paired:
    return Paired(
        items=items,
        good=reference_good - to_bad + to_good,
        reference_good=reference_good,
        flips_to_bad=to_bad,
        flips_to_good=to_good,
        mcnemar_p=mcnemar_p(to_bad, to_good),
    )


GOOD = role_evaluation(2000, 1900, 2, 2)
FAR = LongContext(prompt_tokens=900, retrieval=paired(40, 0, 0, 30), text=TEXT)


@pytest.mark.parametrize(
    ("budget", "figures", "outcome", "words"),
    [
        ({"max_kl": 0.011}, {}, Outcome.NOT_ENOUGH_EVIDENCE, "conversations would decide the mean KL"),
        ({"max_kl": 0.013}, {}, Outcome.PASSED, "mean KL 0.01000, at most 0.01244 with 95 % confidence"),
        (
            {"max_kl": 0.1},
            {"text": TEXT.model_copy(update={"sequences": 3})},
            Outcome.NOT_ENOUGH_EVIDENCE,
            "at least 20 conversations, there are 3",
        ),
        ({"max_grounded_drop": 0.01}, {}, Outcome.NOT_ENOUGH_EVIDENCE, "needs items with grounds"),
        (
            {"max_grounded_drop": 0.01},
            {"grounded": paired(2000, 40, 2, 1990)},
            Outcome.FAILED,
            "drop of grounded answers +0.0190",
        ),
        ({"max_grounded_drop": 0.01}, {"grounded": paired(2000, 1, 1, 1990)}, Outcome.PASSED, "+0.0000"),
        ({"min_valid_json": 0.95}, {}, Outcome.NOT_ENOUGH_EVIDENCE, "needs items with json_schema"),
        (
            {"min_valid_json": 0.95},
            {"valid_json": paired(300, 0, 0, 299)},
            Outcome.PASSED,
            "valid JSON 0.9967",
        ),
        (
            {"min_valid_json": 0.95},
            {"valid_json": paired(30, 0, 0, 29)},
            Outcome.NOT_ENOUGH_EVIDENCE,
            "items would decide the valid JSON",
        ),
        ({"max_long_context_loss": 0.01}, {}, Outcome.NOT_ENOUGH_EVIDENCE, "needs long_context items"),
        ({"max_long_context_loss": 0.01}, {"long_context": FAR}, Outcome.PASSED, "at long context"),
        (
            {"max_long_context_loss": 0.01},
            {
                "long_context": FAR.model_copy(
                    update={"text": TEXT.model_copy(update={"delta_log_perplexity": 0.1})}
                )
            },
            Outcome.FAILED,
            "lose +0.10000",
        ),
    ],
)
def test_a_limit_is_a_test_of_its_own(
    budget: dict[str, float], figures: dict[str, object], outcome: Outcome, words: str
) -> None:
    verdict = judge(card(GOOD.model_copy(update=figures)), "core", QualityBudget.model_validate(budget))
    assert verdict.outcome == outcome, verdict
    assert words in "; ".join(verdict.reasons)


def test_a_lower_bound_of_the_kl_passes_nothing_and_fails_what_it_can() -> None:
    bound = TEXT.model_copy(update={"kl_exact": False, "kl_upper": math.inf, "kl_upper_se": math.inf})
    verdict = judge(card(GOOD.model_copy(update={"text": bound})), "core", QualityBudget(max_kl=1.0))
    assert verdict.outcome == Outcome.NOT_ENOUGH_EVIDENCE
    assert "only a lower bound is known: this server tells of 128 tokens" in " ".join(verdict.reasons)
    assert "measure with Tiercel's engine" in verdict.reasons[-1]
    verdict = judge(card(GOOD.model_copy(update={"text": bound})), "core", QualityBudget(max_kl=0.005))
    assert verdict.outcome == Outcome.FAILED


@pytest.mark.parametrize(
    ("upper", "outcome"),
    [(0.02, Outcome.PASSED), (0.09, Outcome.NOT_ENOUGH_EVIDENCE), (0.2, Outcome.NOT_ENOUGH_EVIDENCE)],
)
def test_between_two_bounds_the_upper_one_is_tested(upper: float, outcome: Outcome) -> None:
    text = TEXT.model_copy(update={"kl_exact": False, "kl_upper": upper, "kl_upper_se": upper / 10})
    verdict = judge(card(GOOD.model_copy(update={"text": text})), "core", QualityBudget(max_kl=0.1))
    assert verdict.outcome == outcome, verdict
    assert f"mean KL between 0.01000 and {upper:.5f}" in " ".join(verdict.reasons)


def test_a_loss_without_its_skewness_shows_nothing() -> None:
    text = TEXT.model_copy(update={"delta_log_perplexity_skewness": None})
    figures = GOOD.model_copy(update={"long_context": FAR.model_copy(update={"text": text})})
    verdict = judge(card(figures), "core", QualityBudget(max_long_context_loss=0.01))
    assert verdict.outcome == Outcome.NOT_ENOUGH_EVIDENCE
    assert "measure the variant again" in verdict.reasons[-1]


@pytest.mark.parametrize("right", [0, 10, 19])
def test_a_reference_that_cannot_do_the_role_gives_no_verdict(right: int) -> None:
    """A variant that gets nothing right either would lose nothing."""
    for to_wrong in (0, right):
        verdict = judge(card(role_evaluation(200, right, to_wrong, 0)), "core", QualityBudget())
        assert verdict.outcome == Outcome.NOT_ENOUGH_EVIDENCE
        assert "the reference itself cannot do this role" in verdict.reasons[0]
        assert f"{right} of the reference's 200 answers" in verdict.reasons[0]
    lenient = QualityBudget(min_reference_accuracy=0.0, max_accuracy_drop=0.02)
    assert judge(card(role_evaluation(800, 40, 0, 0)), "core", lenient).outcome == Outcome.PASSED


def test_a_margin_as_large_as_the_reference_says_nothing() -> None:
    """Where all that the reference gets right may be lost, a variant without any right answer would pass."""
    figures = role_evaluation(1000, 200, 0, 0)
    assert judge(card(figures), "core", QualityBudget(max_accuracy_drop=0.1)).outcome == Outcome.PASSED
    verdict = judge(card(figures), "core", QualityBudget(max_accuracy_drop=0.2))
    assert verdict.outcome == Outcome.NOT_ENOUGH_EVIDENCE
    assert "not more than 0.200" in verdict.reasons[0]


def test_without_right_answers_the_kl_alone_decides() -> None:
    budget = QualityBudget(max_accuracy_drop=None, max_kl=0.05)
    verdict = judge(card(role_evaluation(80, 0, 0, 0)), "core", budget)
    assert verdict.outcome == Outcome.PASSED
    assert not any("accuracy" in reason for reason in verdict.reasons)
    with pytest.raises(ValidationError, match="no limit is set, so nothing could fail"):
        QualityBudget(max_accuracy_drop=None, max_kl=None)


def test_all_of_something_is_never_shown() -> None:
    figures = GOOD.model_copy(update={"valid_json": paired(300, 0, 0, 300)})
    verdict = judge(card(figures), "core", QualityBudget(min_valid_json=1.0))
    assert verdict.outcome == Outcome.NOT_ENOUGH_EVIDENCE
    assert "no number of answers shows that none is ever bad" in verdict.reasons[-1]


def test_the_p_value_inverts_the_bound() -> None:
    for flips in ((0, 0), (3, 2), (9, 3), (2, 9)):
        figures = role_evaluation(400, 380, *flips)
        assert drop_p(figures.task, drop_upper_bound(figures)) == pytest.approx(0.05, abs=1e-3)


def test_holm_matches_a_worked_example() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})


def test_many_gates_together_ask_for_more_evidence() -> None:
    """One gate at p = 0.02 passes; the same one among five that are no better does not."""
    close, budget = role_evaluation(400, 380, 3, 2), QualityBudget(max_accuracy_drop=0.0143)
    alone = card(close)
    assert judge(alone, "core", budget).outcome == Outcome.PASSED
    cards = [card(close, variant=f"v{i}") for i in range(5)]
    family = gate_p_values([card(close, variant="bf16"), *cards], {"core": budget})
    assert sorted(family) == [f"v{i}/core" for i in range(5)]
    assert 0.01 < family["v0/core"] < 0.05
    crowd = alone.model_copy(
        update={
            "variant": "v0",
            "evaluation": alone.evaluation.model_copy(update={"p_values": family})
            if alone.evaluation
            else None,
        }
    )
    verdict = judge(crowd, "core", budget)
    assert verdict.outcome == Outcome.NOT_ENOUGH_EVIDENCE
    assert "after Holm's correction for 5 gates" in " ".join(verdict.reasons)
    assert "items would decide the accuracy drop" in verdict.reasons[-1]
    # A gateway with a wider budget judges again, the others as they were.
    assert judge(crowd, "core", QualityBudget(max_accuracy_drop=0.03)).outcome == Outcome.PASSED


def test_policy_alone_is_no_test() -> None:
    cards = [card(GOOD, variant="a"), card(GOOD, variant="b", bits=8), card(None, variant="c")]
    assert list(gate_p_values(cards, {"core": QualityBudget(min_weight_bits=8)})) == ["b/core"]


def test_the_reference_always_may_serve() -> None:
    verdict = judge(card(None, variant="bf16"), "core", QualityBudget(min_weight_bits=32))
    assert verdict.outcome == Outcome.PASSED


@pytest.mark.parametrize(("wrong", "right", "p"), [(0, 0, 1.0), (1, 1, 1.0), (5, 0, 0.0625), (10, 2, 0.0386)])
def test_mcnemar_matches_the_binomial_table(wrong: int, right: int, p: float) -> None:
    assert mcnemar_p(wrong, right) == pytest.approx(p, abs=1e-4)


def test_wilson_interval_matches_a_known_value() -> None:
    low, high = wilson_interval(90, 100)
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def broken(sign: int) -> TextEvaluation:
    figures = {"delta_log_perplexity": sign * NOT_FINITE, "kl_mean": NOT_FINITE, "kl_upper": NOT_FINITE}
    return TEXT.model_copy(update=figures)


def test_a_variant_whose_scores_are_not_finite_fails_and_no_other() -> None:
    good = role_evaluation(400, 380, 1, 1)
    bad = good.model_copy(update={"text": broken(1)})
    for budget in (QualityBudget(), QualityBudget(max_kl=None)):
        verdict = judge(card(bad), "core", budget)
        assert verdict.outcome is Outcome.FAILED
        assert "its engine answered with numbers that are not finite" in verdict.reasons[0]
    cards = [card(bad, variant="int4"), card(good, variant="int8")]
    family = gate_p_values(cards, {"core": QualityBudget()})
    assert family["int4/core"] == 1
    judged = good_card(family, cards[1])
    assert judge(judged, "core", QualityBudget()).outcome is Outcome.PASSED


def good_card(family: dict[str, float], one: Card) -> Card:
    """The card as it is judged among others."""
    assert one.evaluation is not None
    return one.model_copy(update={"evaluation": one.evaluation.model_copy(update={"p_values": family})})


def test_of_a_reference_whose_scores_are_not_finite_there_is_no_verdict() -> None:
    figures = role_evaluation(400, 380, 1, 1).model_copy(update={"text": broken(-1)})
    verdict = judge(card(figures), "core", QualityBudget())
    assert verdict.outcome is Outcome.NOT_ENOUGH_EVIDENCE
    assert "the reference's engine answered with numbers that are not finite" in verdict.reasons[0]


def test_long_contexts_that_are_not_finite_fail_as_well() -> None:
    figures = role_evaluation(400, 380, 1, 1)
    retrieval = Paired(items=40, good=40, reference_good=40, flips_to_bad=0, flips_to_good=0, mcnemar_p=1)
    far = LongContext(prompt_tokens=900, retrieval=retrieval, text=broken(1))
    verdict = judge(card(figures.model_copy(update={"long_context": far})), "core", QualityBudget())
    assert verdict.outcome is Outcome.FAILED
    assert not_finite(TEXT) is None


def test_a_p_value_that_is_no_number_is_one() -> None:
    tests = [LimitTest(p, False, "", str) for p in (0.001, math.nan)]
    assert max(test.p for test in tests) == max(test.p for test in tests[::-1]) == 1
    assert holm({"a": 0.001, "b": math.nan}) == {"a": 0.002, "b": 1.0}
    assert ClusteredMean(math.nan, 0.1, 30, 2.0).p(0.1) == ClusteredMean(0.01, math.nan, 30, 2.0).p(0.1) == 1
