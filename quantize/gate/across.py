"""The limits of a budget for a variant of another model than the role's first.

What only a model's own reference can tell (its KL, its loss at long context) is compared with that; right
and grounded answers with those of the first model's reference, to the same items. A limit on right answers
is what makes two models comparable: without one nothing is known of how the other model does the role.
"""

from __future__ import annotations

import dataclasses

from quantize.card import Paired, RoleEvaluation
from quantize.gate.budget import QualityBudget
from quantize.gate.limits import LimitTest, limit_tests

OF_ANSWERS = ("max_accuracy_drop", "min_accuracy", "max_grounded_drop", "min_valid_json")
"""Limits on answers, which any two models can be compared by, or which need no other model."""
_NO_LIMITS = ("min_reference_accuracy", "min_weight_bits")


def across_tests(
    figures: RoleEvaluation, budget: QualityBudget, first_model: str, *, is_reference: bool
) -> list[LimitTest]:
    """A test for every limit. ``is_reference``: of its own model, which loses nothing against itself."""
    paired = figures.across.get(first_model)
    if paired is None:
        return [_incomparable(first_model)]
    if budget.max_accuracy_drop is None and budget.min_accuracy is None:
        return [_no_limit(first_model)]
    compared = [
        dataclasses.replace(test, found=f"against {first_model}: {test.found}")
        for test in limit_tests(
            _beside(figures, paired, first_model), _answers_alone(budget, first_model, figures)
        )
    ]
    if budget.max_grounded_drop is not None and first_model not in figures.across_grounded:
        compared.append(_not_grounded(first_model))
    return compared if is_reference else [*compared, *limit_tests(figures, _own_alone(budget))]


def _beside(figures: RoleEvaluation, paired: Paired, first_model: str) -> RoleEvaluation:
    """The same answers, with those of the first model's reference in the place of its own reference's."""
    return figures.model_copy(
        update={
            "items": paired.items,
            "correct": paired.good,
            "reference_correct": paired.reference_good,
            "flips_to_wrong": paired.flips_to_bad,
            "flips_to_right": paired.flips_to_good,
            "mcnemar_p": paired.mcnemar_p,
            "grounded": figures.across_grounded.get(first_model),
            "noise": None,  # of its own reference
        }
    )


def _answers_alone(budget: QualityBudget, first_model: str, figures: RoleEvaluation) -> QualityBudget:
    """What is not compared with the first model is no limit here, nor is what nobody has compared with it."""
    others = [name for name in QualityBudget.model_fields if name not in (*OF_ANSWERS, *_NO_LIMITS)]
    if first_model not in figures.across_grounded:
        others.append("max_grounded_drop")
    return budget.model_copy(update=dict.fromkeys(others))


def _own_alone(budget: QualityBudget) -> QualityBudget:
    return budget.model_copy(update=dict.fromkeys(OF_ANSWERS))


def _incomparable(first_model: str) -> LimitTest:
    fix = (
        "models are compared by right answers alone: give the role tasks with right answers, measure "
        f"{first_model}, and then this model again with `tiercel quantize`"
    )
    said = f"not compared with {first_model}: no right answers to the same items are known of both"
    return LimitTest(1.0, False, said, lambda _level: fix)


def _no_limit(first_model: str) -> LimitTest:
    fix = "models are compared by right answers alone: set max_accuracy_drop, or min_accuracy"
    said = f"not compared with {first_model}: the budget sets no limit on right answers"
    return LimitTest(1.0, False, said, lambda _level: fix)


def _not_grounded(first_model: str) -> LimitTest:
    fix = (
        f"max_grounded_drop needs items with grounds, answered by {first_model} too; give the role some and "
        "measure again, or leave it out"
    )
    return LimitTest(1.0, False, f"grounded answers: not compared with {first_model}", lambda _level: fix)
