"""What a planned variant is compared with at its bytes: plans that anybody would try without a planner."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from quantize.core.files import write_whole
from quantize.core.methods import SMOOTH, in_order, parse_method
from quantize.core.modules import HEAD
from quantize.core.plan import Plan
from quantize.core.schemes import scheme
from quantize.make.streaming import streams
from quantize.plan import autoscheme
from quantize.plan.paired_kl import PairedKl
from quantize.plan.planner import Planner
from quantize.plan.served import KEPT, NotFiniteError, plan_of
from quantize.plan.session import PlanningSession, made_in_order

Kind = Literal["uniform", "random", "ends", "autoscheme"]
KINDS: tuple[Kind, ...] = ("uniform", "random", "ends", "autoscheme")
RANDOM_PLANS = 3
HEADROOM_BITS = 0.001
"""Of AutoScheme's average: the shapes that are stored beside packed weights are none of its."""
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
    session: PlanningSession,
    planner: Planner,
    budget: int,
    kinds: Sequence[Kind],
    say: Callable[[str], None],
    seed: int = 0,
    ordered: bool = False,
) -> Iterator[tuple[str, Kind, Plan]]:
    """The controls that take at most ``budget`` bytes. ``say`` hears which kinds have none. ``ordered``: they
    are made group behind group as the planned variant is, uniform ones in both ways."""
    made: dict[Kind, Callable[[], Mapping[str, Plan]]] = {
        "uniform": lambda: _uniform(session, ordered),
        "random": lambda: _random(planner, budget, seed),
        "ends": lambda: _ends(session, budget),
        "autoscheme": lambda: _autoscheme(session, budget),
    }
    for kind in kinds:
        try:
            found = made[kind]()
        except autoscheme.UnreachableError as error:
            say(f"controls: {kind}: {error}")
            continue
        fitting = {
            label: made_in_order(plan) if ordered and kind != "uniform" else plan
            for label, plan in found.items()
            if plan.weight_bytes(session.modules) <= budget
        }
        if not fitting:
            say(f"controls: no {kind} plan fits in {budget} bytes")
        for label, plan in fitting.items():
            yield label, kind, plan


def _random(planner: Planner, budget: int, seed: int) -> dict[str, Plan]:
    rng = random.Random(seed)
    return {f"random {n}": random_plan(planner, budget, rng) for n in range(1, RANDOM_PLANS + 1)}


def _uniform(session: PlanningSession, ordered: bool) -> dict[str, Plan]:
    """Every scheme that all groups may have, by every method that the planner mixes, and by rounding."""
    made = {}
    methods = [*session.methods, *(map(in_order, session.methods) if ordered else ())]
    for name in _for_all(session):
        for method in dict.fromkeys(("rtn", *methods)):
            by = parse_method(method)
            if (by.asymmetric or SMOOTH in by.transforms) and not streams((name, method)):
                continue
            made[f"{name} {method}"] = Plan(groups=_all(session, name), method=method)
    return made


def _ends(session: PlanningSession, budget: int) -> dict[str, Plan]:
    """The first layer, the last, or both at eight bits; all else at the largest four-bit scheme that fits."""
    layers = session.modules.layers
    names = _for_all(session)
    eights = [name for name in names if scheme(name).weight_bits == 8]
    fours = [name for name in names if scheme(name).weight_bits < 8]
    wanted = {"first layer": {0}, "last layer": {layers - 1}, "first and last layer": {0, layers - 1}}
    made = {}
    for label, high in wanted.items():
        trials = [
            _plan(session, {g.name: eight if g.layer in high else four for g in session.blocks})
            for eight in eights
            for four in fours
        ]
        trials = [plan for plan in trials if plan.weight_bytes(session.modules) <= budget]
        if trials:
            plan = max(trials, key=lambda plan: plan.weight_bytes(session.modules))
            eight, four = plan.groups[_in(session, high)], plan.groups[_in(session, high, outside=True)]
            made[f"{label} {eight}, rest {four}"] = plan
    return made


def _in(session: PlanningSession, layers: set[int], outside: bool = False) -> str:
    found = (g.name for g in session.blocks if (g.layer in layers) != outside)
    return next(found, next(iter(session.blocks)).name)


def _autoscheme(session: PlanningSession, budget: int) -> dict[str, Plan]:
    """AutoRound's own choice, of the schemes that every group may have, at the average that is left."""
    names = [name for name in _for_all(session) if name.startswith(("w4a16", "w8a16", "w8a8"))]
    if len(names) < 2:
        return {}
    weights = sum(group.weights for group in session.blocks)
    average = round(8 * (budget - session.blocks.other_bytes) / weights - HEADROOM_BITS, 3)
    groups = autoscheme.assign(
        session.checkpoint.path,
        session.blocks,
        names,
        average,
        session.directory,
        session.calibration.sequences,
    )
    return {f"AutoScheme at {average:g} bits": _plan(session, groups)}


def _for_all(session: PlanningSession) -> list[str]:
    """Schemes that every group of the blocks has among its choices."""
    choices = session.choices()
    legal = [{name for name, _ in choices[group.name]} for group in session.blocks]
    return [name for name in session.schemes if all(name in names for names in legal)]


def _plan(session: PlanningSession, groups: Mapping[str, str]) -> Plan:
    """The plan of these schemes, each by the last of the methods that the planner has for it; a head stays at
    16 bits."""
    methods = {name: dict(many) for name, many in session.choices().items()}
    chosen = {name: (how, methods[name][how]) for name, how in groups.items()}
    return plan_of({group.name: chosen.get(group.name, KEPT) for group in session.modules})


def _all(session: PlanningSession, name: str) -> dict[str, str]:
    return {group.name: name if group.kind != HEAD else "bf16" for group in session.modules}


def measure(
    session: PlanningSession,
    paired: PairedKl,
    label: str,
    planned: Plan,
    controls: Sequence[tuple[str, Kind, Plan]],
) -> tuple[Compared, ...]:
    """The planned variant and every control, on the same conversations; by bytes. Controls that the engine
    answers with numbers that are not finite are left out, and said. Raises NotFiniteError where the variant
    is one."""

    def row(name: str, kind: Literal["planned", Kind], plan: Plan) -> Compared:
        kl, half = paired.interval(plan)
        if not math.isfinite(kl):
            raise NotFiniteError(f"the engine answers {name} with numbers that are not finite")
        ratio = None if kind == "planned" else paired.ratio(planned, plan)
        return Compared(
            label=name,
            kind=kind,
            bytes=plan.weight_bytes(session.modules),
            bits=plan.bits_per_weight(session.modules),
            kl=kl,
            half=half,
            ratio=ratio.ratio if ratio else None,
            low=ratio.low if ratio else None,
            high=ratio.high if ratio else None,
        )

    rows = [row(label, "planned", planned)]
    for control in controls:
        try:
            rows.append(row(*control))
        except NotFiniteError as error:
            print(f"controls: {error}", file=sys.stderr)
    return tuple(sorted(rows, key=lambda one: (one.bytes, one.kl)))
