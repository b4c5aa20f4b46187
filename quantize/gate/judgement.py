"""The gate: may a variant serve a role? Light on purpose, so that the gateway can judge again.

A role's budget is a set of limits, and each that is measured is a test of the hypothesis "the limit is
broken". A variant passes a role when every such hypothesis is rejected, so that a *pass* is what needs
evidence. A point estimate beyond its limit fails; what is between is "not enough evidence", which does
not pass, and names how many items would decide.

**Tests**, all one-sided and paired on the same items:

- a drop in accuracy (or in grounded answers) within its margin: :func:`quantize.gate.paired.drop_p`;
- mean KL within its limit: the clustered standard error of the mean, normal approximation;
- a loss of log-probability at long context within its limit: likewise.

**Corrections.** Within one (variant, role) every limit must hold, so the largest p-value is the pair's,
and needs none (intersection-union test; Berger, Technometrics 1982;24:295). Across the pairs that were
judged together Holm's procedure (Scandinavian Journal of Statistics 1979;6:65) keeps the probability that
*any* of them passes wrongly at :data:`ALPHA`: the k-th smallest of m p-values passes when it and all smaller
ones are at most ALPHA / (m - k + 1). A card carries the p-values of the pairs it was judged with, so that one
card can be judged again, with another budget as well, as if all were there. What policy alone refuses
(``min_weight_bits``) is no test and does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from pydantic import BaseModel, ConfigDict, Field

from quantize.card import Card, Outcome, Paired, TextEvaluation, Verdict
from quantize.gate.paired import (
    ALPHA,
    POWER,
    detectable_drop,
    drop_p,
    holm,
    items_of_mean,
    items_that_decide,
)
from quantize.gate.paired import drop_upper_bound as drop_upper_bound
from quantize.gate.paired import mcnemar_p as mcnemar_p
from quantize.gate.paired import wilson_interval as wilson_interval

LEAST_SEQUENCES = 10
"""Conversations below which a clustered standard error is no evidence."""
_NORMAL = NormalDist()


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
    max_grounded_drop: float | None = Field(
        default=None, ge=0, le=1, description="largest drop in the share of answers without invented words"
    )
    min_valid_json: float | None = Field(
        default=None, ge=0, le=1, description="smallest share of answers that match their JSON schema"
    )
    max_long_context_loss: float | None = Field(
        default=None,
        ge=0,
        description="largest loss of log-probability of right answers from a full context, nats per token",
    )
    min_weight_bits: int | None = Field(default=None, ge=1, le=32, description="policy, whatever is measured")


@dataclass(frozen=True)
class LimitTest:
    """One limit: what was found, and how probable that is where the limit is broken."""

    p: float
    beyond: bool
    """The point estimate breaks the limit."""
    found: str
    needed: Callable[[float], str]
    """What would decide at a level of significance, in words."""


def gate_p_values(cards: Sequence[Card], budgets: Mapping[str, QualityBudget]) -> dict[str, float]:
    """'variant/role' to the p-value of every pair that is judged by figures: a family for Holm."""
    return {
        _name(card, role): max(test.p for test in tests)
        for card in cards
        for role, budget in budgets.items()
        if (tests := _tests(card, role, budget))
    }


def judge(card: Card, role: str, budget: QualityBudget) -> Verdict:
    """Judge ``card`` for ``role``. A variant without figures for the role cannot pass."""
    if card.variant == card.reference:
        return Verdict(outcome=Outcome.PASSED, reasons=("is the reference",))
    if refusal := _refused(card, budget):
        return Verdict(outcome=Outcome.FAILED, reasons=(refusal,))
    if card.doubts:
        return Verdict(outcome=Outcome.NOT_ENOUGH_EVIDENCE, reasons=card.doubts)
    tests = _tests(card, role, budget)
    if not tests or card.evaluation is None:
        reason = f"not evaluated for role {role}"
        return Verdict(outcome=Outcome.NOT_ENOUGH_EVIDENCE, reasons=(reason,))
    name = _name(card, role)
    family = {**card.evaluation.p_values, name: max(test.p for test in tests)}
    adjusted = holm(family)[name]
    reasons = [test.found for test in tests]
    if any(test.beyond for test in tests):
        return Verdict(outcome=Outcome.FAILED, reasons=tuple(reasons))
    reasons += _correction(family[name], adjusted, len(family))
    if adjusted <= ALPHA:
        return Verdict(outcome=Outcome.PASSED, reasons=tuple(reasons))
    level = ALPHA / len(family)  # the strictest step, so that it suffices whatever the others turn out
    reasons += [test.needed(level) for test in tests if test.p > level]
    return Verdict(outcome=Outcome.NOT_ENOUGH_EVIDENCE, reasons=tuple(reasons))


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


def _tests(card: Card, role: str, budget: QualityBudget) -> list[LimitTest]:
    """One test per limit; none for the reference, by policy, or without figures."""
    if card.variant == card.reference or _refused(card, budget):
        return []
    if card.evaluation is None or (figures := card.evaluation.roles.get(role)) is None:
        return []
    noise = figures.noise.flips if figures.noise else 0
    beside = f" (the reference against itself: {noise} flips)" if noise else ""
    tests = [_drop_test("accuracy drop", figures.task, budget.max_accuracy_drop, beside)]
    if budget.min_accuracy is not None:
        tests.append(_share_test("accuracy", figures.task, budget.min_accuracy))
    if budget.max_kl is not None:
        tests.append(_kl_test(figures.text, budget.max_kl))
    if budget.max_grounded_drop is not None:
        tests.append(
            _drop_test("drop of grounded answers", figures.grounded, budget.max_grounded_drop)
            if figures.grounded
            else _missing("grounded answers", "max_grounded_drop", "items with grounds")
        )
    if budget.min_valid_json is not None:
        tests.append(
            _share_test("valid JSON", figures.valid_json, budget.min_valid_json)
            if figures.valid_json
            else _missing("valid JSON", "min_valid_json", "items with json_schema")
        )
    if budget.max_long_context_loss is not None:
        tests.append(
            _loss_test(figures.long_context.text, budget.max_long_context_loss)
            if figures.long_context
            else _missing("long context", "max_long_context_loss", "long_context items")
        )
    return tests


def _missing(what: str, key: str, items: str) -> LimitTest:
    fix = f"{key} needs {items}; give the role some, or leave it out"
    return LimitTest(1.0, False, f"{what}: not measured", lambda _level: fix)


def _decides(what: str, more: int | None, units: str = "items") -> str:
    if more is None:
        return f"the {what} is at its limit: more {units} would hardly help"
    return f"about {more} {units} would decide the {what}"


def _drop_test(what: str, paired: Paired, margin: float, beside: str = "") -> LimitTest:
    found = (
        f"{what} {paired.drop:+.4f}, at most {drop_upper_bound(paired):+.4f} with 95 % confidence on "
        f"{paired.items} items{beside}; budget {margin:.4f}; a drop of {detectable_drop(paired):.4f} would "
        f"have been seen with {100 * POWER:.0f} % probability"
    )
    return LimitTest(
        drop_p(paired, margin),
        paired.drop > margin,
        found,
        lambda level: _decides(what, items_that_decide(paired, margin, level)),
    )


def _share_test(what: str, paired: Paired, least: float) -> LimitTest:
    """Score test of the variant's own share against ``least`` (Wilson's interval, inverted)."""
    share, n = paired.good / paired.items, paired.items
    spread = math.sqrt(least * (1 - least))
    p = _NORMAL.cdf((least - share) * math.sqrt(n) / spread) if spread else float(share < least)

    def needed(level: float) -> str:
        more = items_of_mean(share - least, spread, n, level)
        return _decides(what, more)

    return LimitTest(p, share < least, f"{what} {share:.4f}; budget at least {least:.4f}", needed)


def _kl_test(text: TextEvaluation, limit: float) -> LimitTest:
    bound = "" if text.kl_exact or not text.sequences else f", a lower bound from {text.kl_vocabulary} tokens"
    high = f" ({text.kl_interval[0]:.5f} to {text.kl_interval[1]:.5f})" if text.kl_interval else ""
    found = (
        f"mean KL {text.kl_mean:.5f}{high} nats per token on {text.tokens} tokens{bound}; budget {limit:.5f}"
    )
    return _mean_test("mean KL", text.kl_mean, text.kl_se, limit, text.sequences, found)


def _loss_test(text: TextEvaluation, limit: float) -> LimitTest:
    loss, error = text.delta_log_perplexity, text.delta_log_perplexity_se
    found = (
        f"at long context right answers lose {loss:+.5f} ± {error:.5f} nats per token on {text.sequences} "
        f"conversations; budget {limit:.5f}"
    )
    return _mean_test("loss at long context", loss, error, limit, text.sequences, found)


def _mean_test(what: str, mean: float, error: float, limit: float, sequences: int, found: str) -> LimitTest:
    """A mean with its clustered standard error against its limit. ``sequences`` 0 means not recorded."""
    if 0 < sequences < LEAST_SEQUENCES:
        fix = f"{what} needs at least {LEAST_SEQUENCES} conversations, there are {sequences}"
        return LimitTest(1.0, mean > limit, found, lambda _level: fix)

    def needed(level: float) -> str:
        more = items_of_mean(limit - mean, error * math.sqrt(sequences), sequences, level)
        return _decides(what, more, "conversations")

    p = _NORMAL.cdf((mean - limit) / error) if error > 0 else float(mean > limit)
    return LimitTest(p, mean > limit, found, needed)
