"""What each recipe and a plan would cost, for `tiercel quantize check`, and how that is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quantize.core.checkpoint import Checkpoint
from quantize.core.cost import Cost
from quantize.core.legality import Target
from quantize.core.modules import Modules
from quantize.core.recipes import RECIPES
from quantize.cost import estimate
from quantize.make.rate import Rates
from quantize.plan.cost import planning_cost
from quantize.plan.planner import PlanError
from quantize.plan.session import choices_on, choosing_places, shortlist, with_served_head


def recipe_costs(
    checkpoint: Checkpoint, modules: Modules, where: Target, lengths: Sequence[int], rates: Rates
) -> dict[str, Cost | str]:
    """Recipe, or ``plan``, to its cost with calibration conversations of those lengths; or to the reason why
    the target does not serve it."""
    found: dict[str, Cost | str] = {}
    for name, recipe in RECIPES.items():
        plan = recipe.plan(modules, where)
        if problems := where.check_plan(plan, modules, checkpoint.head_dim):
            found[name] = str(problems[0])
        else:
            found[name] = estimate(checkpoint, modules, plan, lengths, rates)
    places = choosing_places(len(lengths))
    left = [length for number, length in enumerate(lengths) if number not in places]
    try:
        schemes = shortlist(where, modules)
        planned = with_served_head(where, modules, schemes)
        choices = choices_on(where, planned, schemes)
    except PlanError as error:
        found["plan"] = str(error)
    else:
        chosen = [lengths[number] for number in places]
        found["plan"] = planning_cost(checkpoint, planned, choices, left, chosen, rates=rates)
    return found


def cost_rows(costs: dict[str, Cost | str]) -> list[list[str]]:
    """A table of them."""
    rows = [["", "time", "memory", "disk", ""]]
    for name, cost in costs.items():
        if isinstance(cost, str):
            rows.append([name, "no", "", "", cost])
            continue
        low, high = cost.seconds_range
        memory = f"{size(cost.memory_bytes)} + {size(cost.mapped_bytes)}"
        about = f"{time_text(cost.seconds)} ({time_text(low)} to {time_text(high)})"
        rows.append([name, about, memory, size(cost.disk_bytes), cost.what])
    return rows


def basis(rates: Rates, lengths: Sequence[int], shipped: bool) -> Iterable[str]:
    """How the figures are known, a sentence each. ``shipped``: the conversations are Tiercel's own."""
    given, most = "as given", ""
    if shipped:
        given, most = (
            "those of Tiercel, with the model's own answers; give --calibration for yours",
            "at most ",
        )
    yield f"calibration: {len(lengths):,} conversations, {most}{sum(lengths):,} tokens ({given})"
    speeds = f"{rates.narrow / 1e9:.0f} GFLOP/s in bfloat16 and {rates.wide / 1e9:.0f} in float32"
    if rates.accelerator:
        yield f"times: from {speeds}, measured just now on the accelerator, which is taken to be idle"
    else:
        cores = f"{rates.cores} cores" if rates.cores > 1 else "one core"
        yield (
            f"times: from {speeds} of a core, measured just now in its own time, and {cores}, taken to be "
            "idle; times per weight were measured on two AVX-512 cores with 135 M parameters, where all of "
            "these came out within a factor of two"
        )
    yield "memory: of its own, and pages of the model's files, which the system may drop; disk: at most"


def size(value: int) -> str:
    """Bytes for people."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.2f} MB"


def time_text(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
