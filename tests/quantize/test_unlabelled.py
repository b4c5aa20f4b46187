"""A role without labels: what the reference's own answers allow a gate to say."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from quantize.card import Card, Evaluation, Outcome, Paired, RoleEvaluation, TextEvaluation
from quantize.gate.budget import CHANGED_ANSWERS, FIRST_CHOICES
from quantize.gate.evidence import ItemCounts, hopeless
from quantize.gate.judgement import QualityBudget, gate_p_values, judge
from quantize.gate.paired import mcnemar_p
from quantize.gate.unlabelled import choices_p, least_conversations

ITEMS = 96


def text(
    other: float = 0.05, error: float = 0.005, kl: float = 0.02, sequences: int = ITEMS
) -> TextEvaluation:
    return TextEvaluation(
        tokens=5000,
        perplexity=1.5,
        reference_perplexity=1.5,
        delta_log_perplexity=0.0,
        delta_log_perplexity_se=0.001,
        kl_mean=kl,
        kl_se=kl / 10,
        sequences=sequences,
        kl_p99=1.0,
        kl_vocabulary=128,
        kl_exact=True,
        top1_agreement=1 - other,
        other_choices=other,
        other_choices_se=error,
    )


def paired(items: int, good: int, reference_good: int) -> Paired:
    """Flips in one direction alone."""
    lost = reference_good - good
    return Paired(
        items=items,
        good=good,
        reference_good=reference_good,
        flips_to_bad=max(0, lost),
        flips_to_good=max(0, -lost),
        mcnemar_p=mcnemar_p(max(0, lost), max(0, -lost)),
    )


def figures(kept: int = 60, own: int = 95, **more: Any) -> RoleEvaluation:
    return RoleEvaluation(
        **{
            "evidence": "reference",
            "items": ITEMS,
            "correct": kept,
            "reference_correct": own,
            "flips_to_wrong": own - kept,
            "flips_to_right": 0,
            "same_answer": 10,
            "mcnemar_p": 1.0,
            "text": text(),
            **more,
        }
    )


def card(role: RoleEvaluation, bits: int = 8) -> Card:
    return Card(
        model="m",
        variant="int8",
        reference="bf16",
        scheme="w8a8",
        method="rtn",
        weight_bits=bits,
        module_bits={},
        weight_bytes=1,
        kv_bytes_per_token=1,
        max_model_len=64,
        versions={},
        created="",
        files={},
        evaluation=Evaluation(roles={"default": role}, text=role.text, tasks_sha256="0", engine={}),
    )


@pytest.mark.parametrize(
    ("role", "outcome", "words"),
    [
        (figures(), Outcome.PASSED, "judged by the reference's own answers to 96 conversations"),
        (figures(), Outcome.PASSED, "36 of 96 answers begin otherwise (of the reference's own 1): +0.3646"),
        (figures(text=text(other=0.2)), Outcome.FAILED, "first choices agree in 0.8000 of tokens"),
        (
            figures(text=text(other=0.11, error=0.008)),
            Outcome.NOT_ENOUGH_EVIDENCE,
            "conversations would decide",
        ),
        (figures(text=text(kl=0.2)), Outcome.FAILED, "mean KL 0.20000"),
        (figures(kept=20), Outcome.FAILED, "76 of 96 answers begin otherwise"),
        (figures(kept=20, own=70), Outcome.NOT_ENOUGH_EVIDENCE, "would decide the changed answers"),
        (
            figures(text=text(sequences=25)),
            Outcome.NOT_ENOUGH_EVIDENCE,
            "at least 34 conversations, there are 25",
        ),
        (
            figures(text=text().model_copy(update={"other_choices": None})),
            Outcome.NOT_ENOUGH_EVIDENCE,
            "measure the variant again",
        ),
    ],
)
def test_without_labels_answers_are_compared_with_the_references_own(
    role: RoleEvaluation, outcome: Outcome, words: str
) -> None:
    verdict = judge(card(role), "default", QualityBudget())
    assert verdict.outcome == outcome, verdict
    assert words in "; ".join(verdict.reasons)
    assert "accuracy" not in "; ".join(verdict.reasons), "nobody has said what is right"


def test_what_a_budget_sets_replaces_the_defaults() -> None:
    assert judge(card(figures()), "default", QualityBudget(max_changed_answers=0.2)).outcome == Outcome.FAILED
    wrong = figures(kept=10, text=text(other=0.4, kl=0.02))
    off = QualityBudget(min_first_choice_agreement=0, max_changed_answers=1)
    assert judge(card(wrong), "default", off).outcome == Outcome.PASSED
    assert judge(card(figures()), "default", QualityBudget(min_weight_bits=16)).outcome == Outcome.FAILED
    set_out = QualityBudget().by("reference")
    assert set_out.max_accuracy_drop is None
    assert (set_out.min_first_choice_agreement, set_out.max_changed_answers) == (
        FIRST_CHOICES,
        CHANGED_ANSWERS,
    )


def test_a_limit_that_needs_right_answers_is_not_passed_without_them() -> None:
    verdict = judge(card(figures()), "default", QualityBudget(min_accuracy=0.5))
    assert verdict.outcome == Outcome.NOT_ENOUGH_EVIDENCE
    assert "min_accuracy needs tasks with right answers" in "; ".join(verdict.reasons)


def test_with_labels_nothing_is_asked_of_them_unless_it_is_set() -> None:
    right = figures(evidence="labels", kept=96, own=96, flips_to_wrong=0, text=text(other=0.3))
    assert judge(card(right), "default", QualityBudget(max_accuracy_drop=0.1)).outcome == Outcome.PASSED
    asked = QualityBudget(max_accuracy_drop=0.1, min_first_choice_agreement=0.9)
    assert judge(card(right), "default", asked).outcome == Outcome.FAILED
    wrong = judge(card(right), "default", QualityBudget(max_accuracy_drop=0.1, max_changed_answers=0.1))
    assert "max_changed_answers needs to be judged without tasks" in "; ".join(wrong.reasons)
    assert "judged by 96 items with right answers" in "; ".join(wrong.reasons)


@pytest.mark.parametrize(
    ("valid", "outcome"),
    [
        (paired(40, 0, 3), Outcome.PASSED),  # the reference itself cannot: nothing is asked
        (paired(40, 38, 38), Outcome.PASSED),
        (paired(40, 20, 38), Outcome.FAILED),
        (paired(40, 31, 38), Outcome.NOT_ENOUGH_EVIDENCE),
        (paired(12, 6, 12), Outcome.PASSED),  # too few to say anything
    ],
)
def test_json_is_asked_for_where_the_reference_writes_it(valid: Paired, outcome: Outcome) -> None:
    verdict = judge(card(figures(valid_json=valid)), "default", QualityBudget())
    assert verdict.outcome == outcome, verdict


@pytest.mark.parametrize("perplexity", [20.1, 4000.0, math.inf, math.nan])
def test_a_reference_that_writes_noise_gives_no_verdict(perplexity: float) -> None:
    good = figures()
    assert judge(card(good), "default", QualityBudget()).outcome == Outcome.PASSED
    noise = good.model_copy(update={"text": text().model_copy(update={"reference_perplexity": perplexity})})
    verdict = judge(card(noise), "default", QualityBudget())
    assert verdict.outcome == Outcome.NOT_ENOUGH_EVIDENCE
    assert "the reference's own answers are noise: their perplexity is" in "; ".join(verdict.reasons)
    assert "check its files and chat template" in verdict.reasons[-1]


def test_it_is_said_where_json_is_not_judged() -> None:
    few = judge(card(figures(valid_json=paired(12, 12, 12))), "default", QualityBudget())
    assert "valid JSON is not judged: 12 conversations ask for it, 29 would do; raise" in "; ".join(
        few.reasons
    )
    unable = judge(card(figures(valid_json=paired(40, 10, 10))), "default", QualityBudget())
    assert "is not shown to write it mostly itself (10 of 40)" in "; ".join(unable.reasons)
    for valid, budget in (
        (None, QualityBudget()),
        (paired(40, 40, 40), QualityBudget()),
        (paired(12, 12, 12), QualityBudget(max_valid_json_drop=0.1)),
    ):
        verdict = judge(card(figures(valid_json=valid)), "default", budget)
        assert "is not judged" not in "; ".join(verdict.reasons)


def test_json_is_judged_where_that_is_set() -> None:
    asked = QualityBudget(max_valid_json_drop=0.1)
    few = judge(card(figures(valid_json=paired(12, 12, 12))), "default", asked)
    assert few.outcome == Outcome.NOT_ENOUGH_EVIDENCE
    assert "items would decide the drop of valid JSON" in "; ".join(few.reasons)
    none = judge(card(figures()), "default", asked)
    assert "max_valid_json_drop needs items with json_schema" in "; ".join(none.reasons)


def test_the_largest_p_value_counts_in_the_family() -> None:
    p_values = gate_p_values([card(figures())], {"default": QualityBudget()})
    text = card(figures()).evaluation
    assert text is not None
    assert p_values["int8/default"] >= choices_p(0.05, 0.005, ITEMS, FIRST_CHOICES)


@pytest.mark.parametrize(("agreement", "least"), [(0.5, 20), (0.8, 20), (0.88, 34), (0.9, 40), (0.95, 80)])
def test_the_nearer_the_limit_is_to_all_the_more_conversations_it_takes(agreement: float, least: int) -> None:
    assert least_conversations(agreement) == least


def test_a_limit_of_all_first_choices_is_refused() -> None:
    with pytest.raises(ValidationError):
        QualityBudget(min_first_choice_agreement=1.0)


def test_too_few_conversations_are_said_before_work() -> None:
    few = {"default": ItemCounts(task=30, evidence="reference")}
    found = hopeless(few, {"default": QualityBudget()}, 2)["default"]
    assert found == (
        "min_first_choice_agreement: faultless answers to 30 conversations do not pass among 2 gates; "
        "at least 34 are needed",
    )
    enough = {"default": ItemCounts(task=60, evidence="reference")}
    assert hopeless(enough, {"default": QualityBudget()}, 2) == {}
