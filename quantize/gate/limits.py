"""The limits of a budget as tests, one each: the p-value, what was found, and what would decide, in words."""

from __future__ import annotations

import math

from quantize.card import Paired, RoleEvaluation, TextEvaluation
from quantize.gate.budget import QualityBudget
from quantize.gate.limit import LimitTest, decides, missing, not_finite
from quantize.gate.means import LEAST_SEQUENCES, ClusteredMean, mean_difference, positive_mean
from quantize.gate.paired import ALPHA, POWER, drop_p, drop_upper_bound, items_that_decide, provable_drop
from quantize.gate.shares import items_of_share, share_lower_bound, share_p
from quantize.gate.unlabelled import unlabelled_tests

__all__ = ["LimitTest", "limit_tests", "reference_floor", "useless_reference"]


def limit_tests(figures: RoleEvaluation, budget: QualityBudget) -> list[LimitTest]:
    """A test for every limit that ``budget`` sets. A limit whose figures are missing cannot pass,
    and where scores are not finite that is all there is to say.

    Without labels the limits are :meth:`QualityBudget.by`'s, and answers are the reference's own.
    """
    texts = [figures.text, *([figures.long_context.text] if figures.long_context else [])]
    if broken := [test for text in texts if (test := not_finite(text)) is not None]:
        return broken[:1]
    budget = budget.by(figures.evidence)
    tests: list[LimitTest] = []
    if budget.max_accuracy_drop is not None:
        noise = figures.noise.flips if figures.noise else 0
        beside = f" (the reference against itself: {noise} flips)" if noise else ""
        tests.append(_drop_test("accuracy drop", figures.task, budget.max_accuracy_drop, budget, beside))
    if budget.min_accuracy is not None:
        tests.append(
            _share_test("accuracy", figures.task, budget.min_accuracy)
            if figures.evidence == "labels"
            else missing("accuracy", "min_accuracy", "tasks with right answers")
        )
    if budget.max_kl is not None:
        tests.append(_kl_test(figures.text, budget.max_kl))
    tests += unlabelled_tests(figures, budget)
    if budget.max_grounded_drop is not None:
        tests.append(
            _drop_test("drop of grounded answers", figures.grounded, budget.max_grounded_drop, budget)
            if figures.grounded
            else missing("grounded answers", "max_grounded_drop", "items with grounds")
        )
    if budget.min_valid_json is not None:
        tests.append(
            _share_test("valid JSON", figures.valid_json, budget.min_valid_json)
            if figures.valid_json
            else missing("valid JSON", "min_valid_json", "items with json_schema")
        )
    if budget.max_long_context_loss is not None:
        tests.append(
            _loss_test(figures.long_context.text, budget.max_long_context_loss)
            if figures.long_context
            else missing("long context", "max_long_context_loss", "long_context items")
        )
    return tests


def reference_floor(margin: float, budget: QualityBudget) -> float:
    """The share that the reference must be shown to exceed: a variant that gets nothing right has to break
    the margin, or a drop says nothing."""
    return max(budget.min_reference_accuracy, margin if margin < 1 else 0.0)


def useless_reference(paired: Paired, margin: float, budget: QualityBudget) -> str:
    """Why a drop against this reference says nothing, or an empty string."""
    floor = reference_floor(margin, budget)
    if floor == 0 or share_p(paired.reference_good, paired.items, floor) <= ALPHA:
        return ""
    least = share_lower_bound(paired.reference_good, paired.items)
    return (
        f"{paired.reference_good} of the reference's {paired.items} answers are good, which shows a share of "
        f"at least {least:.3f} with 95 % confidence, not more than {floor:.3f}"
    )


def _drop_test(
    what: str, paired: Paired, margin: float, budget: QualityBudget, beside: str = ""
) -> LimitTest:
    if why := useless_reference(paired, margin, budget):
        fix = (
            "give the role items that the reference can do, or a better reference; where items have no right "
            "answers, set the limit on the drop to null and judge by max_kl"
        )
        said = f"{what}: the reference itself cannot do this role: {why}"
        return LimitTest(1.0, False, said, lambda _level: fix)
    found = (
        f"{what} {paired.drop:+.4f}, at most {drop_upper_bound(paired):+.4f} with 95 % confidence on "
        f"{paired.items} items{beside}; budget {margin:.4f}"
    )
    if paired.drop <= margin:
        found += (
            f"; where nothing is lost, a drop of {provable_drop(paired):.4f} is ruled out with "
            f"{100 * POWER:.0f} % probability"
        )
    return LimitTest(
        drop_p(paired, margin),
        paired.drop > margin,
        found,
        lambda level: decides(what, items_that_decide(paired, margin, level)),
    )


def _share_test(what: str, paired: Paired, least: float) -> LimitTest:
    share = paired.good / paired.items
    bound = share_lower_bound(paired.good, paired.items)
    found = (
        f"{what} {share:.4f}, at least {bound:.4f} with 95 % confidence on {paired.items} items; "
        f"budget at least {least:.4f}"
    )

    def needed(level: float) -> str:
        if least >= 1:
            return f"no number of answers shows that none is ever bad; ask for less than 1 of the {what}"
        return decides(what, items_of_share(share, least, paired.items, level))

    return LimitTest(share_p(paired.good, paired.items, least), share < least, found, needed)


def _kl_test(text: TextEvaluation, limit: float) -> LimitTest:
    """Tests the KL's upper bound, or the KL itself where it is exact; a lower bound alone shows nothing."""
    mean, error = (text.kl_mean, text.kl_se) if text.kl_exact else (text.kl_upper, text.kl_upper_se)
    if not (math.isfinite(mean) and math.isfinite(error)):
        found = (
            f"mean KL at least {text.kl_mean:.5f} nats per token on {text.tokens} tokens; only a lower "
            f"bound is known: this server tells of {text.kl_vocabulary} tokens; budget {limit:.5f}"
        )
        fix = "measure with Tiercel's engine (engine.python), which computes the KL itself"
        return LimitTest(1.0, text.kl_mean > limit, found, lambda _level: fix)
    kind = "mean KL" if mean == text.kl_mean else f"mean KL between {text.kl_mean:.5f} and"
    where = f"({text.tokens} tokens); budget {limit:.5f}"
    estimate = positive_mean(mean, error, text.sequences)
    return _mean_test("mean KL", estimate, limit, f"{kind} {mean:.5f}", where, text.kl_mean > limit)


def _loss_test(text: TextEvaluation, limit: float) -> LimitTest:
    skewness = text.delta_log_perplexity_skewness
    if skewness is None:
        fix = "the card does not hold the loss's skewness; measure the variant again"
        return LimitTest(1.0, False, "loss at long context: not measured", lambda _level: fix)
    estimate = mean_difference(
        text.delta_log_perplexity, text.delta_log_perplexity_se, text.sequences, skewness
    )
    begin = f"at long context right answers lose {estimate.mean:+.5f}"
    where = f"({text.tokens} tokens); budget {limit:.5f}"
    return _mean_test("loss at long context", estimate, limit, begin, where)


def _mean_test(
    what: str, estimate: ClusteredMean, limit: float, begin: str, where: str, beyond: bool | None = None
) -> LimitTest:
    count = estimate.sequences
    beyond = estimate.mean > limit if beyond is None else beyond
    if count < LEAST_SEQUENCES:
        fix = f"the {what} needs at least {LEAST_SEQUENCES} conversations, there are {count}"
        said = f"{begin} nats per token on {count} conversations {where}"
        return LimitTest(1.0, beyond, said, lambda _level: fix)
    found = (
        f"{begin}, at most {estimate.upper_bound():.5f} with 95 % confidence, nats per token on {count} "
        f"conversations {where}"
    )

    def needed(level: float) -> str:
        return decides(what, estimate.sequences_that_decide(limit, level), "conversations")

    return LimitTest(estimate.p(limit), beyond, found, needed)
