"""A smaller model may serve a role when its right answers to the same items are within the budget."""

import pytest

from quantize.card import Card, Outcome, Paired
from quantize.gate.judgement import QualityBudget, gate_p_values, judge, judge_across
from tests.quantize.test_gate import GOOD, TEXT, card, paired, role_evaluation

BUDGET = QualityBudget(max_accuracy_drop=0.02, max_kl=0.1)


def small(variant: str = "int4", **changes: object) -> Card:
    """A variant of the model ``m``, by its figures for the role ``core``."""
    return card(GOOD.model_copy(update=changes), variant=variant)


@pytest.mark.parametrize(
    ("across", "outcome", "words"),
    [
        (paired(2000, 4, 3, 1900), Outcome.PASSED, "against big: accuracy drop +0.0005"),
        (paired(2000, 200, 10, 1900), Outcome.FAILED, "against big: accuracy drop +0.0950"),
        (paired(100, 1, 1, 95), Outcome.NOT_ENOUGH_EVIDENCE, "items would decide the accuracy drop"),
        (paired(2000, 4, 3, 100), Outcome.NOT_ENOUGH_EVIDENCE, "the reference itself cannot do this role"),
    ],
)
@pytest.mark.parametrize("variant", ["int4", "bf16"])
def test_another_model_is_compared_by_right_answers(
    variant: str, across: Paired, outcome: Outcome, words: str
) -> None:
    verdict = judge_across(small(variant, across={"big": across}), "core", BUDGET, "big")
    assert verdict.outcome is outcome, verdict
    assert any(words in reason for reason in verdict.reasons), verdict


def test_its_own_accuracy_against_its_own_reference_decides_nothing() -> None:
    """What it lost by being quantized shows in its right answers, which are compared with better ones."""
    bad = role_evaluation(2000, 1900, 200, 0).model_copy(update={"across": {"big": paired(2000, 4, 3, 1900)}})
    assert judge(card(bad), "core", BUDGET).outcome is Outcome.FAILED
    assert judge_across(card(bad), "core", BUDGET, "big").outcome is Outcome.PASSED


def test_a_quantized_variant_is_held_to_its_own_reference_by_its_kl_and_the_reference_is_not() -> None:
    far = TEXT.model_copy(update={"kl_mean": 0.5, "kl_upper": 0.5, "kl_interval": (0.4, 0.6)})
    across = {"big": paired(2000, 4, 3, 1900)}
    verdict = judge_across(small(text=far, across=across), "core", BUDGET, "big")
    assert verdict.outcome is Outcome.FAILED
    assert any("mean KL 0.50000" in reason for reason in verdict.reasons)
    assert (
        judge_across(small("bf16", text=far, across=across), "core", BUDGET, "big").outcome is Outcome.PASSED
    )


def test_without_right_answers_to_the_same_items_models_cannot_be_compared() -> None:
    verdict = judge_across(small(across={"other": paired(2000, 4, 3, 1900)}), "core", BUDGET, "big")
    assert verdict.outcome is Outcome.NOT_ENOUGH_EVIDENCE
    assert "not compared with big: no right answers to the same items are known of both" in verdict.reasons
    unlimited = QualityBudget(max_accuracy_drop=None, max_kl=0.1)
    verdict = judge_across(small(across={"big": paired(2000, 4, 3, 1900)}), "core", unlimited, "big")
    assert verdict.outcome is Outcome.NOT_ENOUGH_EVIDENCE
    assert any("set max_accuracy_drop" in reason for reason in verdict.reasons)


def test_grounded_answers_are_compared_with_those_of_the_first_models_reference() -> None:
    budget = QualityBudget(max_accuracy_drop=0.02, max_grounded_drop=0.02)
    across, own = {"big": paired(2000, 4, 3, 1900)}, paired(2000, 0, 0, 1900)
    verdict = judge_across(small(across=across, grounded=own), "core", budget, "big")
    assert verdict.outcome is Outcome.NOT_ENOUGH_EVIDENCE
    assert "grounded answers: not compared with big" in verdict.reasons
    for lost, outcome in ((1, Outcome.PASSED), (99, Outcome.FAILED)):
        compared = small(across=across, grounded=own, across_grounded={"big": paired(2000, lost, 0, 1900)})
        assert judge_across(compared, "core", budget, "big").outcome is outcome


def test_the_shares_that_a_budget_asks_for_are_its_own() -> None:
    budget = QualityBudget(max_accuracy_drop=0.02, min_valid_json=0.95)
    across = {"big": paired(2000, 4, 3, 1900)}
    verdict = judge_across(small(across=across, valid_json=paired(2000, 300, 0, 1990)), "core", budget, "big")
    assert verdict.outcome is Outcome.FAILED


def test_of_the_first_model_itself_it_judges_as_ever() -> None:
    assert judge_across(small(), "core", BUDGET, "m") == judge(small(), "core", BUDGET)
    assert judge_across(small("bf16"), "core", BUDGET, "m").reasons == ("is the reference",)


def test_policy_and_doubts_concern_another_models_reference_too() -> None:
    reference = small("bf16", across={"big": paired(2000, 4, 3, 1900)})
    strict = QualityBudget(min_weight_bits=16)
    assert judge_across(reference, "core", strict, "big").outcome is Outcome.FAILED
    doubted = reference.model_copy(update={"doubts": ("its engine was busy",)})
    assert judge_across(doubted, "core", BUDGET, "big").reasons == ("its engine was busy",)


def test_another_models_reference_is_one_of_the_gates_that_are_judged_together() -> None:
    cards = [small(one, across={"big": paired(2000, 4, 3, 1900)}) for one in ("bf16", "int8", "int4")]
    assert sorted(gate_p_values(cards, {"core": BUDGET})) == ["int4/core", "int8/core"]
    family = gate_p_values(cards, {"core": BUDGET}, {"core": "big"})
    assert sorted(family) == ["bf16/core", "int4/core", "int8/core"]
