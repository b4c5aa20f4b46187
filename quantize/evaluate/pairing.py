"""Pairs a variant's measurement with the reference's: item by item, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from quantize.card import (
    Evaluation,
    Evidence,
    LongContext,
    NoiseFloor,
    Paired,
    RoleEvaluation,
    TextEvaluation,
)
from quantize.evaluate.grounding import Grounding
from quantize.evaluate.measure import Measurement, ScoredAnswer, Tasks, tasks_sha256
from quantize.evaluate.reported import reported
from quantize.evaluate.scores import Scored
from quantize.evaluate.statistics import compare_tokens
from quantize.evaluate.tasks import Item, Suite, TaskError, by_first_role
from quantize.gate.evidence import ItemCounts
from quantize.gate.paired import mcnemar_p

Items = Mapping[int, Item]
"""Items of a role by their place in its list."""


def compare(
    reference: Measurement, variant: Measurement, tasks: Tasks, again: Measurement | None = None
) -> Evaluation:
    """The figures of ``variant`` for every role, and of all roles together.

    ``again`` is the reference's second pass: what it differs by from the first is the noise floor. Raises
    TaskError when the two were not asked the same.
    """
    roles = {role: _role(role, items, reference, variant, again) for role, items in tasks.items()}
    pooled = [(role, tasks[role]) for role in dict.fromkeys(by_first_role(tasks).values())]
    return Evaluation(
        roles=roles,
        text=_text(pooled, "task", reference, variant),
        tasks_sha256=tasks_sha256(tasks),
        engine=variant.engine,
        noise=_noise(pooled, reference, again) if again else None,
    )


def across(
    items: Sequence[Item], first: Mapping[int, str], answers: Mapping[int, str]
) -> tuple[Paired, Paired | None]:
    """Right answers, and grounded ones where items have grounds, paired with another model's to the same
    items of a role. Both are texts, so that tokenizers do not matter."""
    task = _suite(items, "task")
    grounded, has = _grounded(task)
    right = _paired(task, first, answers, Item.is_right)
    return right, _paired(grounded, first, answers, has) if grounded else None


def count_items(items: Sequence[Item]) -> ItemCounts:
    """How many of a role's items there are for each limit that a gate can test."""
    task = _suite(items, "task").values()
    return ItemCounts(
        task=len(task),
        grounded=sum(item.grounds is not None for item in task),
        structured=sum(item.json_schema is not None for item in task),
        long_context=len(items) - len(task),
        evidence=_evidence(items),
    )


def _evidence(items: Iterable[Item]) -> Evidence:
    """What answers to a role's items are compared with: right ones as soon as any is labelled."""
    alone = all(item.check == "reference" for item in items if item.suite == "task")
    return "reference" if alone else "labels"


def _role(
    role: str,
    items: Sequence[Item],
    reference: Measurement,
    variant: Measurement,
    again: Measurement | None,
) -> RoleEvaluation:
    before, after = reference.answers[role], variant.answers[role]
    task, far = _suite(items, "task"), _suite(items, "long_context")
    if not task:
        raise TaskError(f"tasks of role {role}: no item outside of long_context; set roles.{role}.tasks")
    evidence = _evidence(items)
    # Without labels the first pass is what is right: what the reference keeps of it is its noise floor.
    right = _paired(
        task, (again or reference).answers[role] if evidence == "reference" else before, after, Item.is_right
    )
    grounded, has = _grounded(task)
    structured = {index: item for index, item in task.items() if item.json_schema is not None}
    return RoleEvaluation(
        evidence=evidence,
        items=right.items,
        correct=right.good,
        reference_correct=right.reference_good,
        flips_to_wrong=right.flips_to_bad,
        flips_to_right=right.flips_to_good,
        mcnemar_p=right.mcnemar_p,
        same_answer=sum(before[index] == after[index] for index in task),
        text=_text([(role, items)], "task", reference, variant),
        grounded=_paired(grounded, before, after, has) if grounded else None,
        valid_json=_paired(structured, before, after, Item.is_valid_json) if structured else None,
        long_context=LongContext(
            prompt_tokens=sum(variant.scored[role][index].prompt_tokens for index in far) / len(far),
            retrieval=_paired(far, before, after, Item.is_right),
            text=_text([(role, items)], "long_context", reference, variant),
            noise_kl=_text([(role, items)], "long_context", reference, again).kl_mean if again else None,
        )
        if far
        else None,
        noise=_noise([(role, items)], reference, again) if again else None,
        reported=reported(task, before, after, _scores(role, items, reference, variant)),
    )


def _grounded(task: Items) -> tuple[Items, Callable[[Item, str], bool]]:
    """The items with grounds, and whether an answer to one says nothing that these do not hold."""
    grounded = {index: item for index, item in task.items() if item.grounds is not None}
    grounding = Grounding(grounded.values())
    return grounded, lambda item, text: not grounding.invented(item, text)


def _paired(
    items: Items, before: Mapping[int, str], after: Mapping[int, str], has: Callable[[Item, str], bool]
) -> Paired:
    pairs = [(has(item, before[index]), has(item, after[index])) for index, item in items.items()]
    to_bad = sum(ours and not theirs for ours, theirs in pairs)
    to_good = sum(theirs and not ours for ours, theirs in pairs)
    return Paired(
        items=len(pairs),
        good=sum(theirs for _, theirs in pairs),
        reference_good=sum(ours for ours, _ in pairs),
        flips_to_bad=to_bad,
        flips_to_good=to_good,
        mcnemar_p=mcnemar_p(to_bad, to_good),
    )


def _text(
    roles: Sequence[tuple[str, Sequence[Item]]], suite: Suite, reference: Measurement, variant: Measurement
) -> TextEvaluation:
    """Token figures of one suite's right answers."""
    pairs = [pair for role, items in roles for pair in _scores(role, items, reference, variant, suite)]
    return compare_tokens([ours for ours, _ in pairs], [theirs for _, theirs in pairs])


def _scores(
    role: str, items: Sequence[Item], reference: Measurement, variant: Measurement, suite: Suite = "task"
) -> list[tuple[Scored, Scored]]:
    """The reference's and the variant's scores of the same tokens, a conversation each."""
    return [
        (ours.scored, _same_tokens(role, index, ours, variant).scored)
        for index, ours in sorted(reference.scored[role].items())
        if items[index].suite == suite
    ]


def _same_tokens(role: str, index: int, ours: ScoredAnswer, variant: Measurement) -> ScoredAnswer:
    theirs = variant.scored.get(role, {}).get(index)
    if theirs is None or theirs.tokens != ours.tokens:
        raise TaskError(
            f"tasks of role {role}, item {index + 1}: the variant's tokenizer splits the right answer in "
            "another way than the reference's; make the variant from the reference's checkpoint"
        )
    return theirs


def _noise(roles: Sequence[tuple[str, Sequence[Item]]], first: Measurement, again: Measurement) -> NoiseFloor:
    pairs = [
        (item, first.answers[role][index], again.answers[role][index])
        for role, items in roles
        for index, item in _suite(items, "task").items()
    ]
    text = _text(roles, "task", first, again)
    return NoiseFloor(
        items=len(pairs),
        flips=sum(item.is_right(a) != item.is_right(b) for item, a, b in pairs),
        other_answers=sum(a != b for _, a, b in pairs),
        kl_mean=text.kl_mean,
        kl_p99=text.kl_p99,
    )


def _suite(items: Sequence[Item], suite: Suite) -> Items:
    return {index: item for index, item in enumerate(items) if item.suite == suite}
