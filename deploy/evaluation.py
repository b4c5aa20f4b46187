"""Several models measured one after another, and compared in the roles that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deploy.across import Say, firsts, measurement_of, with_across
from deploy.engine import EngineSpec
from deploy.making import role_tasks
from deploy.measuring import evaluate_variants, judged
from deploy.models import first_models, registry_of
from deploy.unlabelled import ask_reference
from gateway.config import Config, ModelConfig
from quantize.card import Card, Evaluation, read_card
from quantize.make.compress import QuantizeError


async def evaluate_models(
    config: Config,
    cards: Mapping[str, Sequence[Card]],
    say: Say,
    engines: Mapping[str, EngineSpec] | None = None,
) -> list[Card]:
    """Measure and judge ``cards``, by model, each with its reference among them; see
    :func:`deploy.measuring.evaluate_variants`. Models that others are compared with come first. What was
    measured before is compared anew with what is measured now, which needs no engine."""
    done: dict[str, list[Card]] = {}
    for model in in_order(config, cards):
        await ask_reference(model, say, engines)
        compared = firsts(config, model, role_tasks(model), say)
        if len(cards) > 1:
            say(f"measuring {model.name}")
        done[model.name] = await evaluate_variants(model, cards[model.name], say, engines, compared)
    for model in config.each():
        behind = {first for first in first_models(model).values() if first != model.name}
        if behind & done.keys():
            mine = done.get(model.name, [])
            async with registry_of(model, say).measuring():
                again = {card.variant: card for card in compared_anew(config, model, mine, say)}
            if model.name in done:
                done[model.name] = [again.get(card.variant, card) for card in mine]
    return [card for name in cards for card in done[name]]


def in_order(config: Config, names: Mapping[str, object]) -> list[ModelConfig]:
    """Models by how many of their roles are compared with another model."""
    models = [config.of(name) for name in names]
    return sorted(models, key=lambda model: sum(one != model.name for one in first_models(model).values()))


def compared_anew(config: Config, model: ModelConfig, measured: Sequence[Card], say: Say) -> list[Card]:
    """Versions that were just ``measured``, and of other variants those in use, with figures beside other
    models as these are known now, judged again where that has changed anything. Raises CardError."""
    registry = registry_of(model, say)
    try:
        tasks = role_tasks(model)
    except QuantizeError:
        return []
    compared = firsts(config, model, tasks, say)
    found = {name: read_card(registry.path(name)) for name in registry.variants()}
    found |= {card.variant: card for card in measured}
    cards, evaluations, changed = [], dict[str, Evaluation](), False
    for card in found.values():
        answered = measurement_of(model, card, tasks)
        if card.evaluation is not None and answered is not None and card.state == "ready":
            cards.append(card)
            evaluations[card.variant] = with_across(card.evaluation, answered, tasks, compared)
            changed |= evaluations[card.variant] != card.evaluation
    if not changed:
        return []
    again = judged(registry, cards, evaluations, model)
    for card in again:
        if any((card.variant, card.version) == (one.variant, one.version) for one in measured):
            registry.adopt(card)
    return again
