"""The gate: may this variant serve this role? Answered from paired figures, with the reason.

The drop in accuracy is judged by non-inferiority: the one-sided 95 % upper bound of the paired drop
must lie within the budget. A point estimate beyond the budget fails; anything between is
"not enough evidence", which does not pass. The bound is Agresti and Min's adjusted Wald interval for
matched pairs (Statistics in Medicine 2005;24:729), which stays sensible with few or no flips.
"""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field

from quantize.card import Card, Outcome, RoleEvaluation, Verdict

Z_ONE_SIDED_95 = 1.6448536269514722


class QualityBudget(BaseModel):
    """What a role tolerates. Every limit that is set must hold; the reference itself always may serve."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_accuracy_drop: float = Field(
        default=0.02, ge=0, le=1, description="largest drop in accuracy against the reference"
    )
    min_accuracy: float | None = Field(default=None, ge=0, le=1)
    max_kl: float | None = Field(
        default=0.1, ge=0, description="largest mean KL on the role's answers, nats per token"
    )
    min_weight_bits: int | None = Field(default=None, ge=1, le=32, description="policy, whatever is measured")


def drop_upper_bound(evaluation: RoleEvaluation, z: float = Z_ONE_SIDED_95) -> float:
    """One-sided upper confidence bound of accuracy(reference) - accuracy(variant), paired."""
    worse, better = evaluation.flips_to_wrong + 0.5, evaluation.flips_to_right + 0.5
    n = evaluation.items + 2
    difference = worse - better
    spread = math.sqrt(max(0.0, worse + better - difference**2 / n))
    return (difference + z * spread) / n


def mcnemar_p(to_wrong: int, to_right: int) -> float:
    """Two-sided exact McNemar test: probability of flips at least as one-sided as these."""
    n = to_wrong + to_right
    tail = math.fsum(math.comb(n, k) / 2**n for k in range(min(to_wrong, to_right) + 1))
    return min(1.0, 2 * tail)


def wilson_interval(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion (95 % two-sided by default)."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def judge(card: Card, role: str, budget: QualityBudget) -> Verdict:
    """Judge ``card`` for ``role``. A variant without figures for the role cannot pass."""
    if card.variant == card.reference:
        return Verdict(outcome=Outcome.PASSED, reasons=("is the reference",))
    if budget.min_weight_bits is not None and card.weight_bits < budget.min_weight_bits:
        reason = f"{card.weight_bits}-bit weights, the role asks for {budget.min_weight_bits} or more"
        return Verdict(outcome=Outcome.FAILED, reasons=(reason,))
    if card.evaluation is None or role not in card.evaluation.roles:
        reason = f"not evaluated for role {role}"
        return Verdict(outcome=Outcome.NOT_ENOUGH_EVIDENCE, reasons=(reason,))
    outcomes, reasons = [], []

    def conclude(outcome: Outcome, reason: str) -> None:
        outcomes.append(outcome)
        reasons.append(reason)

    figures = card.evaluation.roles[role]
    drop = (figures.reference_correct - figures.correct) / figures.items
    bound = drop_upper_bound(figures)
    conclude(
        Outcome.PASSED
        if bound <= budget.max_accuracy_drop
        else Outcome.FAILED
        if drop > budget.max_accuracy_drop
        else Outcome.NOT_ENOUGH_EVIDENCE,
        f"accuracy drop {drop:+.4f}, at most {bound:+.4f} with 95 % confidence on {figures.items} items; "
        f"budget {budget.max_accuracy_drop:.4f}",
    )
    if budget.min_accuracy is not None:
        conclude(
            Outcome.PASSED if figures.accuracy >= budget.min_accuracy else Outcome.FAILED,
            f"accuracy {figures.accuracy:.4f}; budget at least {budget.min_accuracy:.4f}",
        )
    if budget.max_kl is not None:
        kl = figures.text.kl_mean
        conclude(
            Outcome.PASSED if kl <= budget.max_kl else Outcome.FAILED,
            f"mean KL {kl:.5f} nats per token on {figures.text.tokens} tokens; budget {budget.max_kl:.5f}",
        )
    worst = next(o for o in (Outcome.FAILED, Outcome.NOT_ENOUGH_EVIDENCE, Outcome.PASSED) if o in outcomes)
    return Verdict(outcome=worst, reasons=tuple(reasons))
