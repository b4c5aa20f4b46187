"""What a planned variant is compared with at its bytes: plans that anybody would try without a planner."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from quantize import autoscheme
from quantize.files import write_whole
from quantize.paired_kl import PairedKl
from quantize.plan import Plan
from quantize.planner import Planner
from quantize.schemes import scheme
from quantize.workshop import Workshop

Kind = Literal["uniform", "random", "ends", "autoscheme"]
KINDS: tuple[Kind, ...] = ("uniform", "random", "ends", "autoscheme")
RANDOM_PLANS = 3
FILE = "controls.json"


class Compared(BaseModel):
    """A plan as it was measured. KL is in nats per token, ``half`` half of its 95 % interval.

    ``ratio`` is the planned variant's KL over this one's, with its paired 95 % interval.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str
    kind: Literal["planned", Kind]
    bytes: int
    bits: float
    kl: float
    half: float
    ratio: float | None = None
    low: float | None = None
    high: float | None = None


class Controls(BaseModel):
    """A planned variant beside its controls, on the same conversations."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: str
    version: str
    measured_on: str
    conversations: int
    tokens: int
    rows: tuple[Compared, ...]

    def write(self, directory: Path) -> Path:
        """Keep it in ``directory``; a reader sees the old file or the new one."""
        write_whole(directory / FILE, self.model_dump_json(indent=1))
        return directory / FILE


def random_plan(planner: Planner, budget: int, rng: random.Random) -> Plan:
    """Groups get random choices, in random order, for as long as the budget lasts."""
    names = [group.name for group in planner.modules]
    smallest = planner.smallest()
    picked: dict[str, tuple[str, str]] = {}
    for _ in range(100):
        trial = dict(smallest)
        for name in rng.sample(names, len(names)):
            changed = trial | {name: rng.choice(planner.choices_of(name))}
            if planner.weight_bytes(changed) <= budget:
                trial = changed
        if not picked or planner.weight_bytes(trial) > planner.weight_bytes(picked):
            picked = trial
        if planner.weight_bytes(picked) > 0.97 * budget:
            break
    return planner.plan(picked)


def plans(
    workshop: Workshop,
    planner: Planner,
    budget: int,
    kinds: Sequence[Kind],
    say: Callable[[str], None],
    seed: int = 0,
) -> Iterator[tuple[str, Kind, Plan]]:
    """The controls that take at most ``budget`` bytes. ``say`` hears which kinds have none."""
    made: dict[Kind, Callable[[], Mapping[str, Plan]]] = {
        "uniform": lambda: _uniform(workshop),
        "random": lambda: _random(planner, budget, seed),
        "ends": lambda: _ends(workshop, budget),
        "autoscheme": lambda: _autoscheme(workshop, budget),
    }
    for kind in kinds:
        fitting = {
            label: plan
            for label, plan in made[kind]().items()
            if plan.weight_bytes(workshop.modules) <= budget
        }
        if not fitting:
            say(f"controls: no {kind} plan fits in {budget} bytes")
        for label, plan in fitting.items():
            yield label, kind, plan


def _random(planner: Planner, budget: int, seed: int) -> dict[str, Plan]:
    rng = random.Random(seed)
    return {f"random {n}": random_plan(planner, budget, rng) for n in range(1, RANDOM_PLANS + 1)}


def _uniform(workshop: Workshop) -> dict[str, Plan]:
    """Every scheme that all groups may have, by every method that the planner mixes, and by rounding."""
    made = {}
    for name in _for_all(workshop):
        for method in dict.fromkeys(("rtn", *workshop.methods)):
            made[f"{name} {method}"] = Plan(groups=_all(workshop, name), method=method)
    return made


def _ends(workshop: Workshop, budget: int) -> dict[str, Plan]:
    """The first layer, the last, or both at eight bits; all else at the largest four-bit scheme that fits."""
    layers = workshop.modules.layers
    names = _for_all(workshop)
    eights = [name for name in names if scheme(name).weight_bits == 8]
    fours = [name for name in names if scheme(name).weight_bits < 8]
    wanted = {"first layer": {0}, "last layer": {layers - 1}, "first and last layer": {0, layers - 1}}
    made = {}
    for label, high in wanted.items():
        trials = [
            Plan(
                groups={g.name: eight if g.layer in high else four for g in workshop.modules},
                method=workshop.methods[-1],
            )
            for eight in eights
            for four in fours
        ]
        trials = [plan for plan in trials if plan.weight_bytes(workshop.modules) <= budget]
        if trials:
            plan = max(trials, key=lambda plan: plan.weight_bytes(workshop.modules))
            eight, four = plan.groups[_in(workshop, high)], plan.groups[_in(workshop, high, outside=True)]
            made[f"{label} {eight}, rest {four}"] = plan
    return made


def _in(workshop: Workshop, layers: set[int], outside: bool = False) -> str:
    found = (g.name for g in workshop.modules if (g.layer in layers) != outside)
    return next(found, next(iter(workshop.modules)).name)


def _autoscheme(workshop: Workshop, budget: int) -> dict[str, Plan]:
    """AutoRound's own choice of 4 and 8 bits at the average that the budget allows."""
    names = _for_all(workshop)
    four = next((name for name in names if name.startswith("w4a16")), None)
    eight = next((name for name in names if name.startswith("w8a8")), None)
    if four is None or eight is None:
        return {}
    weights = sum(group.weights for group in workshop.modules)
    average = round(8 * (budget - workshop.modules.other_bytes) / weights, 3)
    found = autoscheme.assign(
        workshop.checkpoint.path,
        workshop.modules,
        [average],
        workshop.directory,
        workshop.calibration.sequences,
    )[average]
    groups = {name: eight if bits == 8 else four for name, bits in found.items()}
    return {f"AutoScheme at {average:g} bits": Plan(groups=groups, method=workshop.methods[-1])}


def _for_all(workshop: Workshop) -> list[str]:
    """Schemes that every group has among its choices."""
    legal = [{name for name, _ in choices} for choices in workshop.choices().values()]
    return [name for name in workshop.schemes if all(name in names for names in legal)]


def _all(workshop: Workshop, name: str) -> dict[str, str]:
    return {group.name: name for group in workshop.modules}


def measure(
    workshop: Workshop,
    paired: PairedKl,
    label: str,
    planned: Plan,
    controls: Sequence[tuple[str, Kind, Plan]],
) -> tuple[Compared, ...]:
    """The planned variant and every control, on the same conversations; by bytes."""

    def row(name: str, kind: Literal["planned", Kind], plan: Plan) -> Compared:
        kl, half = paired.interval(plan)
        ratio = None if kind == "planned" else paired.ratio(planned, plan)
        return Compared(
            label=name,
            kind=kind,
            bytes=plan.weight_bytes(workshop.modules),
            bits=plan.bits_per_weight(workshop.modules),
            kl=kl,
            half=half,
            ratio=ratio.ratio if ratio else None,
            low=ratio.low if ratio else None,
            high=ratio.high if ratio else None,
        )

    rows = [row(label, "planned", planned), *(row(*control) for control in controls)]
    return tuple(sorted(rows, key=lambda one: (one.bytes, one.kl)))
