"""What can be known of a pipeline's later steps before the first one: by shapes, and by what calibrates."""

from __future__ import annotations

import argparse
from pathlib import Path

from deploy.planning import planning_before, refuse_wanted
from deploy.starter import Starter
from deploy.steps import Kept
from quantize.check import refuse_short
from quantize.core.checkpoint import Checkpoint, weight_bytes
from quantize.core.modules import read_modules
from quantize.core.plan import Plan, uniform
from quantize.core.recipes import RECIPES
from quantize.core.targets import detect, target
from quantize.cost import estimate
from quantize.make.calibration import CalibrationSet
from quantize.plan.cost import estimate_planning
from quantize.plan.session import TRIES, PlanningSession
from quantize.train.loop import TrainError
from quantize.train.qat import QatSettings, Text, Work, refuse_no_room, refuse_untrainable

INT4 = "int4"
"""What is trained where there is no plan."""


def refuse_unmakable(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    calibration: CalibrationSet,
    starter: Starter,
    kept: Kept,
) -> None:
    """Raise an error where variants, a plan or its training cannot be made of what has the shapes of
    ``checkpoint``: schemes, budgets, too few conversations; and memory and the disk, for steps that ``kept``
    does not know to be done."""
    modules, where = read_modules(checkpoint), target(detect())
    lengths = [len(sequence) for sequence in calibration.sequences]
    costs = [
        estimate(checkpoint, modules, RECIPES[name].plan(modules, where), lengths)
        for name in starter.serve
        if name in RECIPES and kept.get("make") is None
    ]
    if options.plan or options.qat:
        session = planning_before(checkpoint, where, calibration, options.schemes)
        tries = TRIES if options.tries is None else options.tries
        if options.plan:
            refuse_wanted(session, options.bits, tries)
            if kept.get("plan") is None:
                costs.append(estimate_planning(session, tries))
        if options.qat:
            most, settings = _trainable(options, session)
            if kept.get("qat") is None:
                refuse_no_room(most, settings, "free some, or leave --qat out")
    copied = 0 if Path(starter.source).exists() else weight_bytes(checkpoint.path)
    refuse_short(costs, options.out, more_bytes=copied)


def _trainable(options: argparse.Namespace, session: PlanningSession) -> tuple[Work, QatSettings]:
    """The most that may be trained. Raises TrainError for settings and schemes with which nothing is."""
    given = {"steps": options.qat_steps, "block_steps": options.qat_block_steps}
    try:
        settings = QatSettings(**{name: value for name, value in given.items() if value is not None})
    except TrainError as error:
        raise TrainError(f"--qat-steps, --qat-block-steps: {error}") from None
    plans: dict[str, Plan]
    if options.plan:
        named = sorted({name for many in session.choices().values() for name, _ in many})
        plans = {name: uniform(session.modules, name) for name in named}
    else:
        plans = {INT4: RECIPES[INT4].plan(session.modules, session.target)}
    for name, plan in plans.items():
        try:
            refuse_untrainable(plan, session.modules)
        except TrainError as error:
            raise TrainError(f"--qat, of a plan that may have {name}: {error}") from None
    return max((_work(session, plan) for plan in plans.values()), key=lambda work: work.weights), settings


def _work(session: PlanningSession, plan: Plan) -> Work:
    """What would be trained, for its size."""
    return Work(
        session.checkpoint,
        session.modules,
        plan,
        Path(),
        lambda _linear: None,
        Text(session.calibration.sequences),
        Text([tokens for tokens, _ in session.choosing]),
        Path(),
    )
