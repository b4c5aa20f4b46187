"""The gate: may a variant serve a role? Light on purpose, so that the gateway can judge again.

A role's budget is a set of limits, and each that is set is a test of the hypothesis "the limit is broken".
A variant passes a role when every such hypothesis is rejected, so that a *pass* is what needs evidence. A
point estimate beyond its limit fails; what is between is "not enough evidence", which does not pass, and
names how many items would decide. A limit on a drop against a reference that itself cannot do the role
gives no verdict.

**Tests**, all one-sided, on the same items for the variant and for the reference:

- a drop in accuracy, or in grounded answers, within its margin: exact, :mod:`quantize.gate.paired`;
- a share of right answers, or of valid JSON, above its limit: exact, :mod:`quantize.gate.shares`;
- mean KL, or the loss of log-probability at long context, below its limit: clustered by conversation,
  Student's t with the skewness taken out, :mod:`quantize.gate.means`.

**Corrections.** Within one (variant, role) every limit must hold, so the largest p-value is the pair's,
and needs none (intersection-union test; Berger, Technometrics 1982;24:295). Across the pairs that were
judged together Holm's procedure (Scandinavian Journal of Statistics 1979;6:65) keeps the probability that
*any* of them passes wrongly at :data:`ALPHA`: the k-th smallest of m p-values passes when it and all smaller
ones are at most ALPHA / (m - k + 1). A card carries the p-values of the pairs it was judged with, so that one
card can be judged again, with another budget as well, as if all were there. What policy alone refuses
(``min_weight_bits``) is no test and does not count.

**Models.** A KL is between two precisions of one model; across models answers alone compare. A variant of
another model is held to its own reference by what only that can tell, and to the reference of the role's
first model by answers to the same items (:func:`judge_across`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantize.card import Card, Outcome, RoleEvaluation, Verdict
from quantize.gate.across import across_tests
from quantize.gate.budget import QualityBudget as QualityBudget
from quantize.gate.family import holm
from quantize.gate.limits import LimitTest, limit_tests
from quantize.gate.paired import ALPHA
from quantize.gate.paired import drop_upper_bound as drop_upper_bound
from quantize.gate.shares import wilson_interval as wilson_interval
from quantize.gate.unlabelled import unjudged_json


def gate_p_values(
    cards: Sequence[Card], budgets: Mapping[str, QualityBudget], first: Mapping[str, str] | None = None
) -> dict[str, float]:
    """'variant/role' to the p-value of every pair that is judged by figures: a family for Holm. ``first``:
    role to the model whose reference others are compared with; without it the cards' own."""
    return {
        _name(card, role): max(test.p for test in tests)
        for card in cards
        for role, budget in budgets.items()
        if (tests := _tests(card, role, budget, (first or {}).get(role, card.model)))
    }


def judge(card: Card, role: str, budget: QualityBudget) -> Verdict:
    """Judge ``card`` for ``role``. A variant without figures for the role cannot pass."""
    return judge_across(card, role, budget, card.model)


def judge_across(card: Card, role: str, budget: QualityBudget, first_model: str) -> Verdict:
    """Judge ``card`` for a ``role`` that ``first_model`` is the first to serve. Of that model itself as
    :func:`judge` does; of another one the reference as well has to show what it can do."""
    if _is_measure(card, first_model):
        return Verdict(outcome=Outcome.PASSED, reasons=("is the reference",))
    if refusal := _refused(card, budget):
        return Verdict(outcome=Outcome.FAILED, reasons=(refusal,))
    if card.doubts:
        return Verdict(outcome=Outcome.NOT_ENOUGH_EVIDENCE, reasons=card.doubts)
    tests = _tests(card, role, budget, first_model)
    if not tests or card.evaluation is None:
        reason = f"not evaluated for role {role}"
        return Verdict(outcome=Outcome.NOT_ENOUGH_EVIDENCE, reasons=(reason,))
    name = _name(card, role)
    family = {**card.evaluation.p_values, name: max(test.p for test in tests)}
    adjusted = holm(family)[name]
    reasons = [test.found for test in tests]
    if (figures := card.evaluation.roles.get(role)) is not None:
        reasons.append(f"judged by {evidence_text(figures)}")
        reasons += filter(None, [unjudged_json(figures, budget)])
    if any(test.beyond for test in tests):
        return Verdict(outcome=Outcome.FAILED, reasons=tuple(reasons))
    reasons += _correction(family[name], adjusted, len(family))
    if adjusted <= ALPHA:
        return Verdict(outcome=Outcome.PASSED, reasons=tuple(reasons))
    level = ALPHA / len(family)  # the strictest step, so that it suffices whatever the others turn out
    reasons += [test.needed(level) for test in tests if test.p > level]
    return Verdict(outcome=Outcome.NOT_ENOUGH_EVIDENCE, reasons=tuple(reasons))


def evidence_text(figures: RoleEvaluation) -> str:
    """What answers were compared with."""
    if figures.evidence == "reference":
        return f"the reference's own answers to {figures.items} conversations"
    return f"{figures.items} items with right answers"


def _is_measure(card: Card, first_model: str) -> bool:
    """Whether it is the one that all others are compared with."""
    return card.model == first_model and card.variant == card.reference


def _name(card: Card, role: str) -> str:
    return f"{card.variant}/{role}"


def _correction(p: float, adjusted: float, tests: int) -> list[str]:
    def text(value: float) -> str:
        return f"{value:.2g}" if value >= 1e-9 else "below 1e-9"

    if tests == 1:
        return [f"p {text(p)}"]
    return [f"p {text(p)}, {text(adjusted)} after Holm's correction for {tests} gates"]


def _refused(card: Card, budget: QualityBudget) -> str:
    """Why policy alone refuses the variant, or an empty string."""
    if budget.min_weight_bits is not None and card.weight_bits < budget.min_weight_bits:
        return f"{card.weight_bits}-bit weights, the role asks for {budget.min_weight_bits} or more"
    return ""


def _tests(card: Card, role: str, budget: QualityBudget, first_model: str) -> list[LimitTest]:
    """One test per limit; none for the first model's reference, by policy, or without figures."""
    if _is_measure(card, first_model) or _refused(card, budget):
        return []
    if card.evaluation is None or (figures := card.evaluation.roles.get(role)) is None:
        return []
    if card.model == first_model:
        return limit_tests(figures, budget)
    return across_tests(figures, budget, first_model, is_reference=card.variant == card.reference)
