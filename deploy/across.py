"""Roles that several models may serve: a model's answers beside those of the role's first model.

Every model is measured by itself, on all items of the roles that it may serve. What another model answered to
the same items lies in its measurements, and is paired item by item with what this one's variants answered. A
model whose first was not measured on the same items is not compared with it, which is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deploy.making import role_tasks
from deploy.models import first_models, registry_of
from gateway.config import Config, ModelConfig
from quantize.card import Card, CardError, Evaluation, Paired, read_card
from quantize.evaluate.journal import Journal
from quantize.evaluate.measure import (
    SERVER,
    Measurement,
    for_all_roles,
    measurement_key,
    read_measurement,
    tasks_sha256,
)
from quantize.evaluate.pairing import across
from quantize.evaluate.tasks import Item

Say = Callable[[str], None]
Tasks = Mapping[str, Sequence[Item]]


@dataclass(frozen=True)
class Compared:
    """What one role of a model is compared with: the role's first model, and its reference's answers."""

    model: str
    answers: Mapping[int, str]


def firsts(config: Config, model: ModelConfig, tasks: Tasks, say: Say) -> dict[str, Compared]:
    """By role, of those whose first model is another one that was measured on the same items."""
    found: dict[str, Compared] = {}
    known: dict[str, tuple[Tasks, Measurement] | str] = {}
    for role, first in first_models(model).items():
        if first == model.name or role not in tasks or not labelled(model, role):
            continue
        if first not in known:
            known[first] = _answers(config.of(first))
        if isinstance(there := known[first], str):
            why = there
        elif list(there[0].get(role, ())) != list(tasks[role]):
            why = f"{first} is asked other items"
        else:
            found[role] = Compared(first, there[1].answers.get(role, {}))
            continue
        say(
            f"{model.name} is not compared with {first} for {role}: {why}; "
            f"`tiercel quantize measure --model {first}` makes up for it"
        )
    return found


def labelled(model: ModelConfig, role: str) -> bool:
    """Whether the role has right answers, by which alone models compare."""
    return model.roles[role].tasks is not None


def _answers(model: ModelConfig) -> tuple[Tasks, Measurement] | str:
    """What a model's reference was asked and answered; or why that is not known."""
    try:
        card = read_card(registry_of(model).path(model.reference))
    except CardError:
        return f"{model.name} has not been made"
    if card.evaluation is None:
        return f"{model.name} was not measured"
    tasks = role_tasks(model)
    found = measurement_of(model, card, tasks)
    return (tasks, found) if found is not None else f"{model.name} was measured on other items"


def measurement_of(model: ModelConfig, card: Card, tasks: Tasks) -> Measurement | None:
    """What a version answered when its card's figures came to be; None where that was to other items, or is
    gone."""
    if card.evaluation is None or card.evaluation.tasks_sha256 != tasks_sha256(tasks):
        return None
    engine = {name: value for name, value in card.evaluation.engine.items() if name != SERVER}
    path = registry_of(model).measurement_path(card, measurement_key(tasks, engine))
    found = for_all_roles(read_measurement(Journal(path)), tasks)
    whole = all(len(found.answers.get(role, ())) == len(items) for role, items in tasks.items())
    return found if whole else None


def with_across(
    evaluation: Evaluation, measured: Measurement, tasks: Tasks, first: Mapping[str, Compared]
) -> Evaluation:
    """The figures with those beside other models, and without what was known of these before."""
    roles = {}
    for role, figures in evaluation.roles.items():
        beside: dict[str, dict[str, Paired]] = {"across": {}, "across_grounded": {}}
        if (other := first.get(role)) is not None:
            right, grounded = across(tasks[role], other.answers, measured.answers[role])
            beside["across"][other.model] = right
            if grounded is not None:
                beside["across_grounded"][other.model] = grounded
        roles[role] = figures.model_copy(update=beside)
    return evaluation.model_copy(update={"roles": roles})
