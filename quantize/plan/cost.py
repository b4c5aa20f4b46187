"""What finding a plan will cost: parts at all choices, estimates, and an engine that loads plans.

    parts       one pass over the model for all of them (:mod:`quantize.cost`)
    estimates   a pass forwards, and for every drawn label one backwards, in bfloat16; per weight, choice and
                sequence the product of two gradients; per weight and choice the noise of some tokens
    in order    the best plan once more, group behind group
    engine      its start; the reference, a uniform variant per scheme and every plan that is tried are
                loaded, and score the conversations that plans are chosen on

Memory is this process's and the engine's, which are there at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantize.core.checkpoint import Checkpoint
from quantize.core.cost import Cost, active_weights
from quantize.core.methods import in_order
from quantize.core.modules import Modules
from quantize.core.schemes import BF16_BYTES, scheme
from quantize.cost import CORE_RATE, FILE_S, PASS, SPREAD, START_S, making, making_memory, pass_tokens
from quantize.make.rate import Rates, machine_rates
from quantize.make.streaming import Choice
from quantize.plan.backward import DRAWS, NOISE_TOKENS
from quantize.plan.session import TRIES, PlanningSession

PRODUCT_S = 4e-10
"""Per weight, choice, sequence and drawn label: two gradients are multiplied and summed."""
ENGINE_START_S, LOAD_S = 15.0, 4.0
"""Until the engine's libraries are imported; to load a checkpoint of no size and to end it again."""
ENGINE_BYTES = 1_100_000_000
"""Resident memory of an engine with a model of no size, beside its KV cache."""
KV_BYTES = 1 << 30
"""Of the engine's KV cache."""
OTHER_PLANS = 4
"""Loads beside the uniform variants and the plans that are tried: the reference, the best plan made in order,
and some to spare."""


def estimate_planning(session: PlanningSession, tries: int = TRIES) -> Cost:
    """Memory, disk and time of finding a plan and making it, from nothing."""
    lengths = [len(sequence) for sequence in session.calibration.sequences]
    chosen = [len(sequence) for sequence, _ in session.choosing]
    return planning_cost(session.checkpoint, session.modules, session.choices(), lengths, chosen, tries)


def planning_cost(
    checkpoint: Checkpoint,
    modules: Modules,
    choices: Mapping[str, Sequence[Choice]],
    lengths: Sequence[int],
    choosing: Sequence[int],
    tries: int = TRIES,
    rates: Rates | None = None,
) -> Cost:
    """The same from ``choices`` by group, and the lengths of conversations that calibrate and that choose."""
    rates = rates or machine_rates()
    tokens, chosen = pass_tokens(choices, lengths), sum(choosing)
    weights = sum(group.weights for group in modules)
    model = modules.other_bytes + BF16_BYTES * weights
    ordered = _made_in_order(choices)
    work = making(checkpoint, modules, choices, lengths, rates)
    if ordered:
        work.together += making(checkpoint, modules, ordered, lengths, rates).together
    work.alone += START_S + FILE_S * model
    active = active_weights(checkpoint, modules)
    rows = sum(group.weights * len(choices[group.name]) for group in modules)
    head = float(checkpoint.text_config["vocab_size"]) * int(checkpoint.text_config["hidden_size"])
    passes = (2.0 * active * (2 + 2 * DRAWS) + 2.0 * head * 3 * DRAWS) * chosen
    noise = 4.0 * rows * min(NOISE_TOKENS, chosen)
    products = PRODUCT_S * DRAWS * len(choosing) * rows * CORE_RATE / rates.wide
    work.together += PASS * passes / rates.narrow + noise / rates.wide + products
    schemes = {name for many in choices.values() for name, _ in many}
    loads = len(schemes) + tries + OTHER_PLANS
    scored = 2.0 * (active + 2 * head) * chosen / rates.narrow
    work.alone += ENGINE_START_S + loads * (LOAD_S + FILE_S * model)
    work.together += loads * PASS * scored
    seconds = work.seconds(rates)
    parts = modules.other_bytes + sum(
        group.stored_bytes(scheme(name)) for group in modules for name, _ in choices[group.name]
    )
    memory = making_memory(checkpoint, modules, choices, tokens, rates)
    if ordered:
        memory = max(memory, making_memory(checkpoint, modules, ordered, tokens, rates))
    engine = ENGINE_BYTES + KV_BYTES + model
    return Cost(
        what=f"a plan, {tries} tried on the engine",
        tokens=tokens + chosen,
        memory_bytes=memory + engine,
        engine_bytes=engine,
        mapped_bytes=model,
        disk_bytes=parts + 2 * model,
        seconds=seconds,
        seconds_range=(seconds / SPREAD, seconds * SPREAD),
    )


def _made_in_order(choices: Mapping[str, Sequence[Choice]]) -> dict[str, Sequence[Choice]]:
    """A choice of each group that can be made behind those before it, else its first; nothing where no group
    has one."""
    found: dict[str, Sequence[Choice]] = {}
    any_of_them = False
    for name, many in choices.items():
        ordered = [(one, after) for one, method in many if (after := in_order(method)) != method]
        any_of_them = any_of_them or bool(ordered)
        found[name] = ordered[:1] or many[:1]
    return found if any_of_them else {}
