"""Variants on their engines: placed, started, compared with their cards, measured and judged.

The reference's engine is measured first, since variants are compared with what it answered; engines start
beside each other as far as :mod:`deploy.placement` finds room. A measurement is found again by what was
asked and on what (:func:`deploy.machine.engine_identity`): after an upgrade it is made anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from deploy.across import Compared, labelled, with_across
from deploy.engine import EngineSpec, need_of, running
from deploy.engine_account import ServedOtherwiseError, checked_account, refuse_otherwise
from deploy.engine_failures import EngineLoadError, EngineRoomError
from deploy.fleet.room import too_large
from deploy.identity import identity_of
from deploy.launches import launch_of
from deploy.machine import look
from deploy.making import labelled_items, role_tasks
from deploy.models import checkpoint_of, first_models, registry_of
from deploy.placement import Machine, PlacementError, Seats
from deploy.ports import free_port
from deploy.turns import Turns, answering_at_once, running_at_once
from deploy.unlabelled import ask_reference, asked_items
from gateway.config import ModelConfig
from quantize.account import suspicion
from quantize.card import ONNX, Card, Evaluation, read_card
from quantize.core.checkpoint import CheckpointError
from quantize.core.engine_figures import EngineAccount, Speed
from quantize.core.tokenizer import tokenizer_differences
from quantize.evaluate.client import EngineClient, EngineError
from quantize.evaluate.journal import Journal
from quantize.evaluate.measure import (
    Measurement,
    for_all_roles,
    measure,
    measurement_key,
    read_measurement,
    reference_path,
)
from quantize.evaluate.pairing import compare, count_items
from quantize.evaluate.speed import measure_labels, measure_speed
from quantize.evaluate.tasks import Item
from quantize.gate.evidence import hopeless
from quantize.gate.judgement import gate_p_values, judge_across
from quantize.registry import Registry
from quantize.report.tables import served_text
from quantize.versions import stale

Say = Callable[[str], None]
T = TypeVar("T")


async def evaluate_variants(
    model: ModelConfig,
    cards: Sequence[Card],
    say: Say,
    engines: Mapping[str, EngineSpec] | None = None,
    first: Mapping[str, Compared] | None = None,
) -> list[Card]:
    """Measure every variant through its engine, compare with the reference, judge, write the cards.

    ``engines`` are those that run already, by ``model:variant``; others are started here, as are those that
    serve another version. A variant that its engine cannot load, or serves otherwise than its card says, is
    marked broken, with the reason; one for which there is no room is left as it was, which is said before any
    engine is started; the others go on. The reference is measured twice: what it differs by from itself is
    the noise floor. ``first``: what of other models roles are compared with. A version that passes is put to
    use.
    """
    await ask_reference(model, say, engines)
    registry = registry_of(model, say)
    async with registry.measuring():
        # As they are now: who was waited for may have measured them.
        cards = [read_card(registry.path(card.variant, card.version)) for card in cards]
        return await _evaluate(model, registry, cards, say, engines or {}, first or {})


async def _evaluate(
    model: ModelConfig,
    registry: Registry,
    cards: Sequence[Card],
    say: Say,
    engines: Mapping[str, EngineSpec],
    first: Mapping[str, Compared],
) -> list[Card]:
    tasks, machine = role_tasks(model), look()
    reference = next(card for card in cards if card.variant == model.reference)
    work = _Work(model, registry, tasks, machine, say, engines, reference)
    ordered = work.that_fit([reference, *(card for card in cards if card is not reference)])
    for card in ordered:
        if card.max_model_len > (taken := _context(model, card)) and model.engine.max_model_len is None:
            say(
                f"{card.variant}: {taken:,} of the model's {card.max_model_len:,} tokens fit into the KV "
                "cache; raise engine.kv_cache_gib for more"
            )
    async with asyncio.TaskGroup() as group:
        tasks_of = [group.create_task(unless_broken(registry, card, work.of(card), say)) for card in ordered]
    results = {
        card.variant: result
        for card, task in zip(ordered, tasks_of, strict=True)
        if (result := task.result()) is not None
    }
    passes = {name: [for_all_roles(one, tasks) for one in found.passes] for name, found in results.items()}
    own, again = passes[model.reference]
    evaluations = {
        name: with_across(compare(own, found[-1], tasks, again), found[0], tasks, first)
        for name, found in passes.items()
    }
    measured = [
        _with_findings(card, results[card.variant], evaluations[card.variant], say)
        if card.variant in results
        else card
        for card in cards
    ]
    done = judged(registry, measured, evaluations, model)
    for card in done:
        if card.variant in evaluations:
            registry.adopt(card)
    return done


def say_hopeless(model: ModelConfig, variants: int, say: Say) -> None:
    """Before any work: say which roles none of ``variants`` can pass on their items, however good it is.

    Raises QuantizeError and TaskError where there are no items at all.
    """
    tasks = {**labelled_items(model), **asked_items(model)}
    counts = {role: count_items(items) for role, items in tasks.items()}
    budgets = {name: role.budget for name, role in model.roles.items()}
    for role, reasons in hopeless(counts, budgets, variants).items():
        say(f"no variant can pass for {role}: {'; '.join(reasons)}")
    for role, first in first_models(model).items():
        if first != model.name and not labelled(model, role):
            say(
                f"nothing of {model.name} can pass for {role}: models are compared by right answers to the "
                f"same items, and it and {first} have none in common; set roles.{role}.tasks"
            )


def _context(model: ModelConfig, card: Card) -> int:
    return model.engine.context(card.max_model_len, card.kv_bytes_per_token)


@dataclass
class Found:
    """What one engine gave: one pass, or two of the reference; its speed, and what it said of itself."""

    passes: list[Measurement]
    speed: Speed | None = None
    account: EngineAccount | None = None


@dataclass
class _Work:
    """Measurements of one configuration: places, and the order in which engines answer."""

    model: ModelConfig
    registry: Registry
    tasks: Mapping[str, list[Item]]
    machine: Machine
    say: Say
    engines: Mapping[str, EngineSpec]
    reference: Card
    reference_done: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        model = self.model
        self.seats = Seats(self.machine, running_at_once(self.machine))
        self.turns = Turns(answering_at_once(model, self.machine))
        self._engines: dict[str, dict[str, str]] = {}

    def engine_of(self, card: Card) -> dict[str, str]:
        """On what a variant is measured."""
        own = card.target or "" if launch_of(card) is not None else ""
        if own not in self._engines:
            self._engines[own] = identity_of(card, self.model, self.machine)
        return self._engines[own]

    def _journal(self, card: Card) -> Journal:
        key = measurement_key(self.tasks, self.engine_of(card))
        return Journal(self.registry.measurement_path(card, key))

    def that_fit(self, cards: Sequence[Card]) -> list[Card]:
        """Those whose engines have room, one after another; of the others it is said what would help. Raises
        PlacementError for the reference."""
        needs = {
            card.id: need_of(card, self.registry.path(card.variant, card.version), self.model.engine)
            for card in cards
            if card.id not in self.engines and self.known(card) is None
        }
        refused = too_large(self.machine, list(needs.values()))
        if (why := refused.get(self.reference.id)) is not None:
            raise PlacementError(why)
        for card in cards:
            if card.id in refused:
                self.say(f"{card.id} {card.version} is not measured, its card stays: {refused[card.id]}")
        return [card for card in cards if card.id not in refused]

    def known(self, card: Card) -> Found | None:
        """What was measured on the same engine before; None where anything is missing."""
        known = [
            read_measurement(journal, self._compared_with(card, number))
            for number, journal in enumerate(self._journals(card).values())
        ]
        if card.speed is None or stale(card, self.engine_of(card)) or not all(one.done for one in known):
            return None
        return Found(known, card.speed, card.account)

    async def of(self, card: Card) -> Found:
        """Measure one variant, or read what was measured on the same engine before."""
        own = card.variant == self.model.reference
        journals = self._journals(card)
        if (known := self.known(card)) is not None:
            if own:
                self.reference_done.set()
            return known
        async with AsyncExitStack() as stack:
            url, account = await self._engine(stack, card)
            client = await stack.enter_async_context(EngineClient(url, card.model))
            if own:
                await refuse_other_tokens(self.model, client)
            else:
                await self.reference_done.wait()
            async with self.turns.one():
                passes = []
                for number, (name, journal) in enumerate(journals.items()):
                    passes.append(
                        await measure(
                            client,
                            self.tasks,
                            self.engine_of(card),
                            name,
                            journal,
                            reference=self._compared_with(card, number),
                            backwards=number > 0,
                        )
                    )
                    if own:
                        self.reference_done.set()
            async with self.turns.alone():
                speed = await speed_or_none(client, card, _context(self.model, card), self.say)
            return Found(passes, speed or card.speed, account)

    def _journals(self, card: Card) -> dict[str, Journal]:
        journal = self._journal(card)
        journals, path = {card.variant: journal}, journal.path
        if card.variant == self.model.reference:
            again = path.with_name(f"{path.name.split('.json')[0]}-2.json.gz")
            journals[f"{card.variant} again"] = Journal(again)
        return journals

    def _compared_with(self, card: Card, number: int) -> Path | None:
        """What is kept of the reference's first pass, with which all others are compared."""
        if card.variant == self.model.reference and number == 0:
            return None
        return reference_path(self._journal(self.reference))

    async def _engine(self, stack: AsyncExitStack, card: Card) -> tuple[str, EngineAccount | None]:
        """The address of the variant's engine, running and compared with the card."""
        directory = self.registry.path(card.variant, card.version)
        given = self.engines.get(self.model.id(card.variant))
        if given is not None and given.directory == directory:
            return given.url, await checked_account(card, given.url)
        settings = self.model.engine
        placed = await stack.enter_async_context(self.seats.take(need_of(card, directory, settings)))
        # A head that is not the variant's own is read from the reference's files.
        beside = self.registry.path(self.reference.variant, self.reference.version).resolve()
        env = {"TIERCEL_REFERENCE": str(beside), **settings.env}
        spec = EngineSpec(
            card=card,
            directory=directory,
            settings=settings.model_copy(update={"env": env}),
            port=free_port(settings.host),
            log=self.model.variants_dir / ".logs" / f"engine-{card.variant}.log",
            placed=placed,
        )
        engine = await stack.enter_async_context(running(spec, self.say))
        account = await refuse_otherwise(engine)
        self.say(f"{card.variant}: {account_text(account)}")
        return spec.url, account


async def refuse_other_tokens(model: ModelConfig, client: EngineClient) -> None:
    """Raise CheckpointError where the engine makes other tokens of a text than the model's own tokenizer, by
    which calibration data were read."""
    checkpoint = checkpoint_of(model)
    if found := await tokenizer_differences(checkpoint, client.tokenize):
        more = f" (and {len(found) - 1} texts more)" if len(found) > 1 else ""
        raise CheckpointError(
            f"the engine reads text otherwise than it was calibrated: {found[0]}{more}; let it take the "
            "model's own tokenizer and chat template (see engine.extra_args), or put those that it takes "
            "beside the model"
        )


def account_text(account: EngineAccount | None) -> str:
    """What an engine said of itself, as a sentence."""
    if account is None:
        return "its engine does not tell what it serves; nothing was compared with the card"
    return f"the engine serves {served_text(account)}, as the card says"


def _with_findings(card: Card, found: Found, evaluation: Evaluation, say: Say) -> Card:
    """The card with what its engine said and how fast it was, and with doubts where there are reasons."""
    doubts: tuple[str, ...] = ()
    if is_quantized(card) and equals_reference(evaluation):
        doubts = (suspicion(card, found.account),)
        say(f"{card.variant}: suspicious: {doubts[0]}")
    return card.model_copy(update={"speed": found.speed, "account": found.account, "doubts": doubts})


def is_quantized(card: Card) -> bool:
    return card.variant != card.reference and (card.weight_bits < 16 or card.kv != "auto")


def equals_reference(evaluation: Evaluation) -> bool:
    """Whether every answer and every score is the reference's, in every bit."""
    text = evaluation.text
    same_scores = text.kl_mean == text.kl_p99 == text.delta_log_perplexity == 0 and text.top1_agreement == 1
    return same_scores and all(role.same_answer == role.items for role in evaluation.roles.values())


async def speed_or_none(client: EngineClient, card: Card, longest: int, say: Say) -> Speed | None:
    """A variant's speed. An engine that cannot write what it is measured by (its context may be shorter) has
    none, which is said: what was found out about quality stands without it."""
    measuring = measure_labels if card.target == ONNX else measure_speed
    try:
        return await measuring(client, longest)
    except EngineError as error:
        say(f"{card.variant}: its speed was not measured: {error}")
        return None


def judged(
    registry: Registry,
    cards: Sequence[Card],
    evaluations: Mapping[str, Evaluation],
    model: ModelConfig,
) -> list[Card]:
    """The cards with their figures and the verdicts on all of them together, written. A variant without
    figures could not be loaded; its card is what the registry holds."""
    budgets, first = {name: role.budget for name, role in model.roles.items()}, first_models(model)
    loaded = {
        card.variant: card.model_copy(
            update={"evaluation": evaluations[card.variant], "state": "ready", "engine_words": ""}
        )
        for card in cards
        if card.variant in evaluations
    }
    p_values = gate_p_values(list(loaded.values()), budgets, first)
    for name, card in loaded.items():
        evaluation = evaluations[name].model_copy(update={"p_values": p_values})
        card = card.model_copy(update={"evaluation": evaluation})
        gate = {role: judge_across(card, role, budget, first[role]) for role, budget in budgets.items()}
        loaded[name] = registry.update(card.model_copy(update={"gate": gate}))
    return [loaded.get(card.variant) or registry.card(card.variant, card.version) for card in cards]


async def unless_broken(registry: Registry, card: Card, work: Awaitable[T], say: Say) -> T | None:
    """What ``work`` on a variant's engine gives, or None when the engine cannot load the variant: then it is
    marked broken, with the engine's words. Where the engine only wanted room, nothing is known of the
    variant and its card stays as it was. The reference must be measured: its errors are raised."""
    try:
        return await work
    except EngineLoadError as error:
        if card.variant == card.reference:
            raise
        registry.mark_broken(card, error.words)
        otherwise = isinstance(error, ServedOtherwiseError)
        why = "it is not what its card says" if otherwise else "the engine cannot load it"
        say(f"{card.variant} {card.version} is broken, {why}: {error.words}")
        return None
    except (EngineRoomError, PlacementError) as error:
        if card.variant == card.reference:
            raise
        say(f"{card.variant} {card.version} was not measured, its card stays as it was: {error}")
        return None
