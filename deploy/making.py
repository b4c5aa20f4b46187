"""``tiercel quantize``: checkpoint → variants; :mod:`deploy.measuring` measures and judges them.

Finished work is never done twice: a variant that exists with the same inputs is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gateway.config import Config, RoleSettings
from quantize.card import Card
from quantize.check import reference_bytes, refuse_pattern, refuse_short, refuse_unfit
from quantize.core.checkpoint import open_checkpoint
from quantize.core.methods import SMOOTH, parse_method
from quantize.core.modules import read_modules
from quantize.core.plan import Plan, uniform
from quantize.core.recipes import RECIPES
from quantize.core.targets import Target, detect, target
from quantize.core.tensors import refuse_not_finite
from quantize.cost import estimate
from quantize.evaluate.tasks import Item, read_items
from quantize.make.calibration import read_calibration
from quantize.make.compress import QuantizeError
from quantize.make.smooth import unsmoothed
from quantize.registry import Registry

Say = Callable[[str], None]


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
    calibrated = config.calibration is not None
    wanted = [RECIPES[name] for name in variants if name != config.reference]
    plans = {recipe.variant: recipe.plan(modules, where, calibrated) for recipe in wanted}
    for recipe in wanted if not calibrated else ():
        if recipe.without_data:
            say(
                f"{recipe.variant} is made by {recipe.without_data}, for calibration is not set; with "
                f"conversations like those to be served it is made by {recipe.method}, which loses less"
            )
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
    """Make the reference and a variant per plan. A plan that would not load on the target is left out, which
    is said. Raises QuantizeError where none is left.

    ``before`` is what else is looked at before work: it comes after what is quicker.
    """
    checkpoint = open_checkpoint(config.model.path)
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
    refuse_pattern(config.variants_dir)
    if before is not None:
        before()
    refuse_unfit(checkpoint)
    for note in checkpoint.notes:
        say(note)
    smooth = any(SMOOTH in parse_method(plan.method).transforms for plan in plans.values())
    if smooth and (left := unsmoothed(checkpoint.config, modules)):
        say(f"smoothing leaves {', '.join(left)} as they are: their scales cannot be folded in exactly")
    needs_data = any(parse_method(plan.method).needs_data(plan) for plan in plans.values())
    calibration = read_calibration(config.calibration, checkpoint) if needs_data else None
    tokens = [len(sequence) for sequence in calibration.sequences] if calibration else [0]
    registry = Registry(config.variants_dir, config.model.name, config.reference, say)
    missing = registry.missing(checkpoint, plans, calibration)
    costs = [estimate(checkpoint, modules, plan, tokens) for plan in missing.values()]
    taken_in = registry.has_reference(checkpoint)
    reference = 0 if taken_in else reference_bytes(checkpoint, config.variants_dir)
    refuse_short(costs, config.variants_dir, more_bytes=reference)
    refuse_not_finite(checkpoint.path)
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
            items = read_items(role.tasks, name)
            if role.long_context:
                items += read_items(role.long_context, name, "long_context")
            tasks[name] = [_as_asked(item, role) for item in items]
    if not tasks:
        raise QuantizeError("no role has tasks; give roles.<role>.tasks, or use --no-evaluate")
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
