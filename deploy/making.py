"""``tiercel quantize``: checkpoint → variants; :mod:`deploy.measuring` measures and judges them.

Finished work is never done twice: a variant that exists with the same inputs is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from deploy.models import checkpoint_of, registry_of
from deploy.unlabelled import answered_items, calibration_for
from gateway.config import ModelConfig, RoleSettings
from quantize.card import Card
from quantize.check import reference_bytes, refuse_pattern, refuse_short, refuse_unfit
from quantize.core.methods import SMOOTH, parse_method
from quantize.core.modules import read_modules
from quantize.core.plan import Plan, uniform
from quantize.core.recipes import RECIPES
from quantize.core.targets import Target, detect, target
from quantize.core.tensors import refuse_not_finite
from quantize.cost import estimate
from quantize.evaluate.tasks import Item, read_items
from quantize.make.compress import QuantizeError
from quantize.make.massive import rounds_inputs, spared
from quantize.make.smooth import unsmoothed
from quantize.make.streaming import refuse_choice
from quantize.make.variant import part_store

Say = Callable[[str], None]


def make_variants(
    model: ModelConfig,
    variants: Sequence[str],
    say: Say,
    target_name: str | None = None,
    before: Callable[[bool], None] | None = None,
) -> list[Card]:
    """Make the reference and the named ``variants`` if they are not there yet. Returns their cards."""
    unknown = [name for name in variants if name not in RECIPES and name != model.reference]
    if unknown:
        known = ", ".join([model.reference, *RECIPES])
        raise QuantizeError(f"unknown variant {unknown[0]!r}; known: {known}")
    where = target(target_name or detect())
    modules = read_modules(checkpoint_of(model, say))
    plans = {name: RECIPES[name].plan(modules, where) for name in variants if name != model.reference}
    return make_plans(model, plans, where, say, before, sparing=True)


def make_one(
    model: ModelConfig,
    name: str | None,
    scheme: str,
    method: str,
    kv: str,
    say: Say,
    target_name: str | None = None,
    before: Callable[[bool], None] | None = None,
) -> list[Card]:
    """Make the reference and one uniform variant, called after what it is unless ``name`` says otherwise."""
    where = target(target_name or detect())
    plan = uniform(read_modules(checkpoint_of(model, say)), scheme, kv=kv, method=method)
    kv_name = "" if kv == "auto" else f"-{kv}"
    called = name or f"{scheme}-{method.replace('+', '-')}{kv_name}"
    return make_plans(model, {called: plan}, where, say, before)


def make_plans(
    model: ModelConfig,
    plans: Mapping[str, Plan],
    where: Target,
    say: Say,
    before: Callable[[bool], None] | None = None,
    *,
    sparing: bool = False,
) -> list[Card]:
    """Make the reference and a variant per plan. A plan that would not load on the target is left out, which
    is said. Raises QuantizeError where none is left.

    ``before`` is what else is done before work, after what is quicker; it is told whether any plan is made by
    calibration data, which the reference may have to answer. ``sparing``: what writes a massive activation
    stays in 16 bits where its inputs would be rounded (:mod:`quantize.make.massive`).
    """
    checkpoint = checkpoint_of(model, say)
    modules = read_modules(checkpoint)
    refused = {}
    for name, plan in plans.items():
        if problems := where.check_plan(plan, modules, checkpoint.head_dim):
            more = f" (and {len(problems) - 2} more)" if len(problems) > 2 else ""
            refused[name] = "; ".join(str(problem) for problem in problems[:2]) + more
    if refused and len(refused) == len(plans):
        raise QuantizeError("; ".join(f"{name}: {why}" for name, why in refused.items()))
    for name, why in refused.items():
        say(f"{name} is left out, {where.name} does not serve it: {why}")
    plans = {name: plan for name, plan in plans.items() if name not in refused}
    for plan in plans.values():
        for group, scheme_name in plan.groups.items():
            refuse_choice((scheme_name, plan.method_of(group)))
    refuse_pattern(model.variants_dir)
    refuse_unfit(checkpoint)
    for note in checkpoint.notes:
        say(note)
    refuse_not_finite(checkpoint.path)
    registry = registry_of(model, say)
    if not registry.has_reference(checkpoint):
        refuse_short([], model.variants_dir, more_bytes=reference_bytes(checkpoint, model.variants_dir))
    smooth = any(SMOOTH in parse_method(plan.method).transforms for plan in plans.values())
    if smooth and (left := unsmoothed(checkpoint.config, modules)):
        say(f"smoothing leaves {', '.join(left)} as they are: their scales cannot be folded in exactly")
    needs_data = any(parse_method(plan.method).needs_data(plan) for plan in plans.values())
    if before is not None:
        before(needs_data)
    reference = registry.add_reference(checkpoint)
    calibration = calibration_for(model, checkpoint, reference.version) if needs_data else None
    tokens = [len(sequence) for sequence in calibration.sequences] if calibration else [0]
    if sparing and calibration is not None and any(map(rounds_inputs, plans.values())):
        layers = part_store(registry.directory, checkpoint, modules, calibration).massive
        plans = {name: spared(plan, modules, layers) for name, plan in plans.items()}
        for layer in layers:
            say(f"layer {layer}'s down projection stays in 16 bits: it writes a massive activation")
    missing = registry.missing(checkpoint, plans, calibration)
    refuse_short(
        [estimate(checkpoint, modules, plan, tokens) for plan in missing.values()], model.variants_dir
    )
    cards = [reference]
    if plans:
        for number, (name, plan) in enumerate(plans.items(), 1):
            say(f"[{number}/{len(plans)}] {name}: {plan.describe()} by {plan.method}")
            cards.append(registry.add(checkpoint, name, plan, calibration, target=where.name))
    return cards


def role_tasks(model: ModelConfig) -> dict[str, list[Item]]:
    """Held-out items of every role, long contexts last: those of its task file, or conversations with the
    reference's own answers, as far as it has given any. Raises TaskError and QuantizeError."""
    if not (tasks := all_items(model)):
        raise QuantizeError("no role has items: the reference has answered nothing yet; measure it first")
    return tasks


def all_items(model: ModelConfig) -> dict[str, list[Item]]:
    """The same, of those roles that have any. Raises TaskError."""
    found = {**labelled_items(model), **answered_items(model)}
    return {name: items for name, items in found.items() if items}


def labelled_items(model: ModelConfig) -> dict[str, list[Item]]:
    """Items of the roles that have a task file. Raises TaskError."""
    tasks: dict[str, list[Item]] = {}
    for name, role in model.roles.items():
        if role.tasks:
            items = read_items(role.tasks, name)
            if role.long_context:
                items += read_items(role.long_context, name, "long_context")
            tasks[name] = [_as_asked(item, role) for item in items]
    return tasks


def _as_asked(item: Item, role: RoleSettings) -> Item:
    """The item with what its role sets and it does not set itself."""
    of_role = {"max_tokens": role.max_tokens, "chat_template_kwargs": role.chat_template_kwargs or None}
    missing = {
        name: value
        for name, value in of_role.items()
        if value is not None and name not in item.model_fields_set
    }
    return item.model_copy(update=missing)
