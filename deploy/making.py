"""``tiercel quantize``: checkpoint → variants → measured on real engines → cards with verdicts.

Finished work is never done twice: a variant that exists with the same inputs is kept, an engine's
answers are kept per variant version and task set, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import asyncio
import os
import platform
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypeVar

from deploy.engine import EngineLoadError, EngineSpec, running
from gateway.config import Config
from quantize.card import Card, Evaluation, Speed
from quantize.check import reference_bytes, refuse_pattern, refuse_short, refuse_unfit
from quantize.core.checkpoint import open_checkpoint
from quantize.core.methods import parse_method
from quantize.core.modules import read_modules
from quantize.core.plan import Plan, uniform
from quantize.core.recipes import RECIPES
from quantize.core.targets import Target, detect, target
from quantize.core.tensors import refuse_not_finite
from quantize.cost import estimate
from quantize.evaluate.client import EngineClient, EngineError
from quantize.evaluate.journal import Journal
from quantize.evaluate.measure import (
    Measurement,
    measure,
    measurement_key,
    read_measurement,
    reference_path,
)
from quantize.evaluate.pairing import compare
from quantize.evaluate.speed import measure_speed
from quantize.evaluate.tasks import Item, read_items
from quantize.gate.judgement import QualityBudget, gate_p_values, judge
from quantize.make.calibration import read_calibration
from quantize.make.compress import QuantizeError
from quantize.registry import Registry

ENGINES_AT_ONCE = 2
"""While one engine answers, the next one starts, or answers too where it has threads of its own."""

Say = Callable[[str], None]
T = TypeVar("T")


def make_variants(
    config: Config,
    variants: Sequence[str],
    say: Say,
    target_name: str | None = None,
    before: Callable[[], None] | None = None,
) -> list[Card]:
    """Make the reference and the named ``variants`` if they are not there yet. Returns their cards."""
    unknown = [name for name in variants if name not in RECIPES and name != config.reference]
    if unknown:
        known = ", ".join([config.reference, *RECIPES])
        raise QuantizeError(f"unknown variant {unknown[0]!r}; known: {known}")
    where = target(target_name or detect())
    modules = read_modules(open_checkpoint(config.model.path))
    plans = {name: RECIPES[name].plan(modules, where) for name in variants if name != config.reference}
    return make_plans(config, plans, where, say, before)


def make_one(
    config: Config,
    name: str | None,
    scheme: str,
    method: str,
    kv: str,
    say: Say,
    target_name: str | None = None,
    before: Callable[[], None] | None = None,
) -> list[Card]:
    """Make the reference and one uniform variant, called after what it is unless ``name`` says otherwise."""
    where = target(target_name or detect())
    plan = uniform(read_modules(open_checkpoint(config.model.path)), scheme, kv=kv, method=method)
    kv_name = "" if kv == "auto" else f"-{kv}"
    called = name or f"{scheme}-{method.replace('+', '-')}{kv_name}"
    return make_plans(config, {called: plan}, where, say, before)


def make_plans(
    config: Config,
    plans: Mapping[str, Plan],
    where: Target,
    say: Say,
    before: Callable[[], None] | None = None,
) -> list[Card]:
    """Make the reference and a variant per plan. Raises QuantizeError for a plan that would not load.

    ``before`` is what else is looked at before work: it comes after what is quicker.
    """
    checkpoint = open_checkpoint(config.model.path)
    modules = read_modules(checkpoint)
    for name, plan in plans.items():
        if problems := where.check_plan(plan, modules, checkpoint.head_dim):
            more = f" (and {len(problems) - 2} more)" if len(problems) > 2 else ""
            raise QuantizeError(f"{name}: " + "; ".join(str(problem) for problem in problems[:2]) + more)
    refuse_pattern(config.variants_dir)
    if before is not None:
        before()
    refuse_unfit(checkpoint)
    for note in checkpoint.notes:
        say(note)
    needs_data = any(parse_method(plan.method).needs_data(plan) for plan in plans.values())
    calibration = read_calibration(config.calibration, checkpoint) if needs_data else None
    tokens = [len(sequence) for sequence in calibration.sequences] if calibration else [0]
    costs = [estimate(checkpoint, modules, sum(tokens), max(tokens), plan.method) for plan in plans.values()]
    reference = reference_bytes(checkpoint, config.variants_dir)
    refuse_short(costs, config.variants_dir, more_bytes=reference)
    refuse_not_finite(checkpoint.path)
    registry = Registry(config.variants_dir, config.model.name, config.reference, say)
    cards = [registry.add_reference(checkpoint)]
    if plans:
        for number, (name, plan) in enumerate(plans.items(), 1):
            say(f"[{number}/{len(plans)}] {name}: {plan.describe()} by {plan.method}")
            cards.append(registry.add(checkpoint, name, plan, calibration, target=where.name))
    return cards


def role_tasks(config: Config) -> dict[str, list[Item]]:
    """Held-out items of every role that has a task file, long contexts last. Raises TaskError."""
    tasks: dict[str, list[Item]] = {}
    for name, role in config.roles.items():
        if role.tasks:
            tasks[name] = read_items(role.tasks, name)
            if role.long_context:
                tasks[name] += read_items(role.long_context, name, "long_context")
    if not tasks:
        raise QuantizeError("no role has tasks; give roles.<role>.tasks, or use --no-evaluate")
    return tasks


async def evaluate_variants(
    config: Config, cards: Sequence[Card], say: Say, engines: Mapping[str, str] | None = None
) -> list[Card]:
    """Measure every variant through its engine, compare with the reference, judge, write the cards.

    ``engines`` are base URLs of engines that run already, by variant; others are started here. A variant
    that its engine cannot load is marked broken, with the engine's words; the others go on. The reference is
    measured twice: what it differs by from itself is the noise floor.
    """
    tasks, engine = role_tasks(config), engine_description(config)
    key = measurement_key(tasks, engine)
    registry = Registry(config.variants_dir, config.model.name, config.reference)
    slots = asyncio.Semaphore(ENGINES_AT_ONCE)
    answering = Turns(answering_at_once(config))
    speeds: dict[str, Speed] = {}
    of_reference = next(card for card in cards if card.variant == config.reference)
    reference = registry.path(config.reference, of_reference.version)
    kept = reference_path(Journal(registry.measurement_path(of_reference, key)))
    reference_measured = asyncio.Event()

    async def measured(card: Card) -> list[Measurement]:
        if card.variant != config.reference:
            await reference_measured.wait()  # what variants are compared with
        path = registry.measurement_path(card, key)
        journals = {card.variant: Journal(path)}
        if card.variant == config.reference:
            journals[f"{card.variant} again"] = Journal(
                path.with_name(f"{path.name.split('.json')[0]}-2.json.gz")
            )
        references = {name: None if name == config.reference else kept for name in journals}
        known = [read_measurement(journal, references[name]) for name, journal in journals.items()]
        if card.speed is not None and all(one.done for one in known):
            reference_measured.set()
            return known
        async with AsyncExitStack() as stack:
            if (url := (engines or {}).get(card.variant)) is None:
                await stack.enter_async_context(slots)
                spec = EngineSpec(
                    card=card,
                    directory=registry.path(card.variant, card.version),
                    host=config.engine.host,
                    port=free_port(config.engine.host),
                    log=config.variants_dir / ".logs" / f"engine-{card.variant}.log",
                )
                beside = {"TIERCEL_REFERENCE": str(reference.resolve())}
                settings = config.engine.model_copy(update={"env": {**beside, **config.engine.env}})
                await stack.enter_async_context(running(spec, settings, say))
                url = spec.url
            client = await stack.enter_async_context(EngineClient(url, card.model))
            async with answering.one():
                passes = []
                for name, journal in journals.items():  # the reference's second is compared with its first
                    second = name != card.variant
                    passes.append(
                        await measure(
                            client, tasks, engine, name, journal, reference=references[name], backwards=second
                        )
                    )
                    reference_measured.set()
            async with answering.alone():
                if (speed := await speed_or_none(client, card.variant, say)) is not None:
                    speeds[card.variant] = speed
            return passes

    async with asyncio.TaskGroup() as group:
        running_measurements = [
            group.create_task(unless_broken(registry, card, measured(card), say)) for card in cards
        ]
    results = {
        card.variant: result
        for card, task in zip(cards, running_measurements, strict=True)
        if (result := task.result()) is not None
    }
    first, again = results[config.reference]
    evaluations = {name: compare(first, passes[-1], tasks, again) for name, passes in results.items()}
    budgets = {name: role.budget for name, role in config.roles.items()}
    timed = [card.model_copy(update={"speed": speeds.get(card.variant, card.speed)}) for card in cards]
    return judged(registry, timed, evaluations, budgets)


async def speed_or_none(client: EngineClient, variant: str, say: Say) -> Speed | None:
    """A variant's speed. An engine that cannot write what it is measured by (its context may be shorter) has
    none, which is said: what was found out about quality stands without it."""
    try:
        return await measure_speed(client)
    except EngineError as error:
        say(f"{variant}: its speed was not measured: {error}")
        return None


class Turns:
    """Lets so many engines answer side by side, or one alone."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._free = asyncio.Semaphore(most)
        self._first = asyncio.Lock()

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """A turn beside others."""
        async with self._free:
            yield

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """A turn while no other engine answers. It is not to be taken within another turn."""
        taken = 0
        async with self._first:
            try:
                for _ in range(self._most):
                    await self._free.acquire()
                    taken += 1
                yield
            finally:
                for _ in range(taken):
                    self._free.release()


def judged(
    registry: Registry,
    cards: Sequence[Card],
    evaluations: Mapping[str, Evaluation],
    budgets: Mapping[str, QualityBudget],
) -> list[Card]:
    """The cards with their figures and the verdicts on all of them together, written. A variant without
    figures could not be loaded; its card is what the registry holds."""
    loaded = {
        card.variant: card.model_copy(
            update={"evaluation": evaluations[card.variant], "state": "ready", "engine_words": ""}
        )
        for card in cards
        if card.variant in evaluations
    }
    p_values = gate_p_values(list(loaded.values()), budgets)
    for name, card in loaded.items():
        evaluation = evaluations[name].model_copy(update={"p_values": p_values})
        card = card.model_copy(update={"evaluation": evaluation})
        gate = {role: judge(card, role, budget) for role, budget in budgets.items()}
        loaded[name] = registry.update(card.model_copy(update={"gate": gate}))
    return [loaded.get(card.variant) or registry.card(card.variant, card.version) for card in cards]


async def unless_broken(registry: Registry, card: Card, work: Awaitable[T], say: Say) -> T | None:
    """What ``work`` on a variant's engine gives, or None when the engine cannot load the variant: then it is
    marked broken, with the engine's words. The reference must load: its EngineLoadError is raised."""
    try:
        return await work
    except EngineLoadError as error:
        if card.variant == card.reference:
            raise
        registry.mark_broken(card, error.words)
        say(f"{card.variant} {card.version} is broken, the engine cannot load it: {error.words}")
        return None


def answering_at_once(config: Config) -> int:
    """Engines that can answer side by side without taking each other's cores; 1 where they use all."""
    cores = os.cpu_count() or 1
    threads = config.engine.env.get("OMP_NUM_THREADS", "")
    return max(1, min(ENGINES_AT_ONCE, cores // int(threads))) if threads.isdigit() and int(threads) else 1


def engine_description(config: Config) -> dict[str, str]:
    """Where the numbers come from: kernels differ between processors and settings."""
    flags = cpu_line("flags").split()
    kinds = [name for name in ("amx_int8", "avx512_vnni", "avx512f", "avx2") if name in flags]
    return {
        "machine": platform.machine(),
        "cpu": cpu_line("model name"),
        "instructions": kinds[0] if kinds else "baseline",
        "env": " ".join(f"{name}={value}" for name, value in sorted(config.engine.env.items())),
    }


def cpu_line(name: str) -> str:
    """The first line of that name in /proc/cpuinfo, or an empty string."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
