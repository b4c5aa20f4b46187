"""Limits of answers that nobody has called right: a variant's against the reference's own.

- First choices: of each conversation the share of tokens whose likeliest one is another than the
  reference's, while the reference's own answer is read. Conversations are the units and count alike: their
  shares are not negative, and a mean over them is tested as a KL's is (:mod:`quantize.gate.means`). Weighted
  by tokens, a few long answers would decide, and a limit would be passed wrongly in 9 % of samples where
  lengths differ much (simulated).
- Changed answers: an item is *kept* where an answer begins as the reference's did. The reference itself does
  not keep all, since engines compute in other batches: what it loses is the noise floor, and the variant's
  loss beyond that is a drop between paired shares, tested exactly (:mod:`quantize.gate.paired`).
- Valid JSON: a drop as well. By default nothing is asked of a variant where the reference itself mostly
  fails, or where so few answers are to be JSON that even a good one could not pass.
- The reference: its answers are its likeliest words. One that finds these unlikely itself writes noise, and
  being like it is no merit: there is no verdict.
"""

from __future__ import annotations

import itertools
import math

from quantize.card import Paired, RoleEvaluation, TextEvaluation
from quantize.gate.budget import LOST_JSON, QualityBudget
from quantize.gate.limit import LimitTest, decides, missing
from quantize.gate.means import LEAST_SEQUENCES, positive_mean
from quantize.gate.paired import ALPHA, drop_p, drop_upper_bound, flips_p, items_that_decide
from quantize.gate.shares import share_lower_bound, share_p

LEAST_LOSSES = 4
"""Conversations that would be lost in whole at the limit, were it all or nothing: with fewer a sample too
often shows none of them."""
STRICT = ALPHA / 9
"""Level at which, by default, JSON is judged only where a variant that loses one answer can still pass."""
ABLE = 0.5
"""Share of valid JSON that the reference must be shown to exceed before a drop is asked about."""

NOISE_PERPLEXITY = 20.0
"""Of a reference's own answers. Language models have less than 3, random numbers hundreds."""


def unlabelled_tests(figures: RoleEvaluation, budget: QualityBudget) -> list[LimitTest]:
    """A test for each of these limits that ``budget`` sets."""
    tests: list[LimitTest] = []
    if figures.evidence == "reference" and not figures.text.reference_perplexity <= NOISE_PERPLEXITY:
        tests.append(_noise(figures.text))
    if budget.min_first_choice_agreement:
        tests.append(_choices_test(figures.text, budget.min_first_choice_agreement))
    if budget.max_changed_answers is not None and budget.max_changed_answers < 1:
        tests.append(
            _changed_test(figures.task, budget.max_changed_answers)
            if figures.evidence == "reference"
            else missing("changed answers", "max_changed_answers", "to be judged without tasks")
        )
    if (most := budget.max_valid_json_drop) is not None:
        if figures.valid_json is None:
            tests.append(missing("drop of valid JSON", "max_valid_json_drop", "items with json_schema"))
        else:
            tests.append(_json_test(figures.valid_json, most))
    elif figures.evidence == "reference" and figures.valid_json is not None and _tells(figures.valid_json):
        tests.append(_json_test(figures.valid_json, LOST_JSON))
    return tests


def _noise(text: TextEvaluation) -> LimitTest:
    fix = "give the model that was meant, check its files and chat template, or judge by tasks of your own"
    return LimitTest(
        1.0,
        False,
        f"the reference's own answers are noise: their perplexity is {text.reference_perplexity:,.1f} to "
        f"itself, above {NOISE_PERPLEXITY:g}, so being like it says nothing",
        lambda _level: fix,
    )


def unjudged_json(figures: RoleEvaluation, budget: QualityBudget) -> str:
    """Why answers that are to be JSON are not judged as such though there are some, or an empty string."""
    valid = figures.valid_json
    asked = budget.max_valid_json_drop is not None or budget.min_valid_json is not None
    if asked or figures.evidence != "reference" or valid is None or _tells(valid):
        return ""
    if not is_able(valid):
        own = f"{valid.reference_good} of {valid.items}"
        return f"valid JSON is not judged: the reference is not shown to write it mostly itself ({own})"
    least = next(count for count in itertools.count(valid.items) if _is_enough(count))
    return (
        f"valid JSON is not judged: {valid.items} conversations ask for it, {least} would do; raise "
        "conversations.count, or set max_valid_json_drop"
    )


def _tells(valid_json: Paired) -> bool:
    """Whether a variant's JSON is judged unasked."""
    return is_able(valid_json) and _is_enough(valid_json.items)


def _is_enough(answers: int) -> bool:
    """Whether a variant that loses one of so many can still pass in a strict family."""
    return flips_p(answers, 1, 0, LOST_JSON) <= STRICT


def is_able(valid_json: Paired) -> bool:
    """Whether the reference is shown to give valid JSON more often than not."""
    return share_p(valid_json.reference_good, valid_json.items, ABLE) <= ALPHA


def least_conversations(agreement: float) -> int:
    """Fewest conversations on which an agreement of first choices is tested."""
    return max(LEAST_SEQUENCES, math.ceil(LEAST_LOSSES / (1 - agreement) - 1e-9))


def choices_p(other: float, error: float, conversations: int, agreement: float) -> float:
    """p-value against "first choices agree in ``agreement`` of tokens or fewer"."""
    if conversations < least_conversations(agreement):
        return 1.0
    if error <= 0:  # alike in all: as if each conversation had been one draw
        return share_p(conversations, conversations, agreement) if other == 0 else 1.0
    return positive_mean(other, error, conversations).p(1 - agreement)


def _choices_test(text: TextEvaluation, agreement: float) -> LimitTest:
    if text.other_choices is None:
        fix = "the card does not hold them by conversation; measure the variant again"
        return LimitTest(1.0, False, "agreement of first choices: not measured", lambda _level: fix)
    count, least = text.sequences, least_conversations(agreement)
    begin = f"first choices agree in {1 - text.other_choices:.4f} of tokens"
    where = f"{count} conversations ({text.tokens} tokens); budget at least {agreement:.4f}"
    beyond = 1 - text.other_choices < agreement
    if count < least:
        fix = f"agreement of first choices needs at least {least} conversations, there are {count}"
        return LimitTest(1.0, beyond, f"{begin}, {where}", lambda _level: fix)
    estimate = positive_mean(text.other_choices, text.other_choices_se, count)
    bound = 1 - estimate.upper_bound() if text.other_choices_se > 0 else share_lower_bound(count, count)

    def needed(level: float) -> str:
        more = estimate.sequences_that_decide(1 - agreement, level)
        return decides("agreement of first choices", more, "conversations")

    return LimitTest(
        choices_p(text.other_choices, text.other_choices_se, count, agreement),
        beyond,
        f"{begin}, at least {bound:.4f} with 95 % confidence on {where}",
        needed,
    )


def _changed_test(kept: Paired, most: float) -> LimitTest:
    own = kept.items - kept.reference_good
    return _drop(
        kept,
        most,
        "changed answers",
        f"{kept.items - kept.good} of {kept.items} answers begin otherwise (of the reference's own {own}): "
        f"{kept.drop:+.4f}",
    )


def _json_test(valid: Paired, most: float) -> LimitTest:
    return _drop(
        valid,
        most,
        "drop of valid JSON",
        f"valid JSON {valid.good} of {valid.items} (the reference {valid.reference_good}): {valid.drop:+.4f}",
    )


def _drop(paired: Paired, most: float, what: str, begin: str) -> LimitTest:
    return LimitTest(
        drop_p(paired, most),
        paired.drop > most,
        f"{begin}, at most {drop_upper_bound(paired):+.4f} with 95 % confidence; budget {most:.4f}",
        lambda level: decides(what, items_that_decide(paired, most, level)),
    )
