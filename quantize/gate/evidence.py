"""Evidence that can never come: which roles' items are too few, said before any engine is started."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from quantize.card import Evidence
from quantize.gate.budget import QualityBudget
from quantize.gate.family import holm
from quantize.gate.limits import reference_floor
from quantize.gate.means import LEAST_SEQUENCES
from quantize.gate.paired import ALPHA, fewest_items, flips_p
from quantize.gate.shares import fewest_answers, share_p
from quantize.gate.unlabelled import choices_p, least_conversations


@dataclass(frozen=True)
class ItemCounts:
    """How many items a role has, by what can be measured on them."""

    task: int
    grounded: int = 0
    structured: int = 0
    long_context: int = 0
    evidence: Evidence = "labels"


@dataclass(frozen=True)
class _Best:
    """A limit at its best: no flips, all answers good, as many conversations as there are."""

    key: str
    p: float
    items: int
    kind: str
    fewest: int | None
    """Items with which the strictest step of Holm's procedure could be passed; None: no number."""

    def sentence(self, gates: int) -> str:
        together = f" among {gates} gates" if gates > 1 else ""
        have = f"{self.key}: faultless answers to {self.items} {self.kind} do not pass{together}"
        if self.fewest is None:
            return f"{have}, and no number would; change the limit, or set it to null"
        return f"{have}; at least {self.fewest} are needed"


def hopeless(
    items: Mapping[str, ItemCounts], budgets: Mapping[str, QualityBudget], variants: Sequence[int] | int
) -> dict[str, tuple[str, ...]]:
    """Role to the reasons why none of the variants can pass it, however good they are.

    ``variants`` are the weights' bits of every one that will be judged, the reference left out; a number
    stands for so many of 8 bits. They are taken to answer every item as the reference does, and well, and are
    judged together by Holm's procedure; roles that could pass then are not in the result. A variant that
    ``min_weight_bits`` refuses is not judged.
    """
    weight_bits = [8] * variants if isinstance(variants, int) else variants
    roles = {
        role: sum(bits >= (budgets[role].min_weight_bits or 0) for bits in weight_bits)
        for role in items
        if role in budgets
    }
    gates = sum(roles.values())
    best = {
        role: list(_best(items[role], budgets[role].by(items[role].evidence), ALPHA / gates))
        for role, count in roles.items()
        if count
    }
    family = {
        f"{number}/{role}": max(limit.p for limit in limits)
        for role, limits in best.items()
        for number in range(roles[role])
    }
    adjusted = holm(family)
    return {
        role: tuple(limit.sentence(gates) for limit in limits if limit.p > ALPHA / gates)
        for role, limits in best.items()
        if all(adjusted[f"{number}/{role}"] > ALPHA for number in range(roles[role]))
    }


def _best(items: ItemCounts, budget: QualityBudget, level: float) -> Iterator[_Best]:
    for key, margin, count, kind in (
        ("max_accuracy_drop", budget.max_accuracy_drop, items.task, "items"),
        ("max_grounded_drop", budget.max_grounded_drop, items.grounded, "items with grounds"),
    ):
        if margin is not None:
            p = flips_p(count, 0, 0, margin) if count else 1.0
            floor = reference_floor(margin, budget)
            if floor and share_p(count, count, floor) > ALPHA:
                p = 1.0
            needed = [fewest_items(margin, level), fewest_answers(floor, ALPHA)]
            fewest = None if None in needed else max(one for one in needed if one is not None)
            yield _Best(key, p, count, kind, fewest)
    for key, least, count, kind in (
        ("min_accuracy", budget.min_accuracy, items.task, "items"),
        ("min_valid_json", budget.min_valid_json, items.structured, "items with json_schema"),
    ):
        if least is not None:
            yield _Best(key, share_p(count, count, least), count, kind, fewest_answers(least, level))
    yield from _best_of_unlabelled(items, budget, level)
    for key, limit, count, kind in (
        ("max_kl", budget.max_kl, items.task, "conversations"),
        ("max_long_context_loss", budget.max_long_context_loss, items.long_context, "long_context items"),
    ):
        if limit is not None:
            yield _Best(key, float(count < LEAST_SEQUENCES), count, kind, LEAST_SEQUENCES)


def _best_of_unlabelled(items: ItemCounts, budget: QualityBudget, level: float) -> Iterator[_Best]:
    """Of limits on answers that nobody has called right. Whether the reference writes JSON is not known."""
    if agreement := budget.min_first_choice_agreement:
        fewest = max(least_conversations(agreement), fewest_answers(agreement, level) or 0)
        p = choices_p(0.0, 0.0, items.task, agreement)
        yield _Best("min_first_choice_agreement", p, items.task, "conversations", fewest)
    if (most := budget.max_changed_answers) is not None and most < 1:
        p = flips_p(items.task, 0, 0, most) if items.task else 1.0
        yield _Best("max_changed_answers", p, items.task, "conversations", fewest_items(most, level))
