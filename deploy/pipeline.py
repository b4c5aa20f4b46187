"""``tiercel train pipeline``: train → merge → plan → QAT → gate → serve, each step a command of its own.

Every step is in a process of its own, which leaves no memory taken, and can be given alone. All that can be
known is looked at before the first one. What is finished is not done again: the same command goes on where it
was stopped, within a step as well.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deploy.children import own_environment
from deploy.commands.before import refuse_unmeasurable
from deploy.identity import identity_of
from deploy.machine import look
from deploy.making import role_tasks
from deploy.measuring import say_hopeless
from deploy.models import checkpoint_of, registry_of
from deploy.pipeline_before import INT4, refuse_unmakable
from deploy.pipeline_file import TrainedFile, trained_file
from deploy.served import who_serves
from deploy.starting import refuse_before_work
from deploy.steps import Kept, Say, Step, run_step
from deploy.training import job_of
from deploy.unlabelled import calibration_for
from gateway.config import ModelConfig, load_config
from quantize.card import Card, CardError, read_card
from quantize.check import refuse_pattern
from quantize.core.checkpoint import base_sha256
from quantize.core.files import locked
from quantize.core.modules import read_modules
from quantize.core.recipes import RECIPES
from quantize.evaluate.measure import tasks_sha256
from quantize.train.adapters import adapter_sha256
from quantize.train.loop import TrainError
from quantize.train.run import ADAPTER, MODEL, Job, finished, fitting
from quantize.versions import stale

MERGED, PLANNED = "merged", "planned"
KEPT, LOCK = "pipeline.json", ".pipeline"
TRAINING_OPTIONS = (
    *("model", "role", "data", "held_out", "out", "memory", "epochs", "steps", "rate", "batch", "together"),
    *("length", "rank", "alpha", "dropout", "targets", "judge", "evaluate_every", "keep_every", "seed"),
    *("device", "checkpointing", "nf4"),
)


def run_pipeline(options: argparse.Namespace, say: Say) -> None:
    """All steps that are not done, one after another. Raises TrainError, and before any work whatever would
    stop a step that can be known."""
    job = job_of(options, options.method, lambda _text: None)
    file = trained_file(options, job.checkpoint, _trained(options), _more(options), say)
    _refuse_before_work(options, job, file, say)
    with locked(options.out / LOCK, f"the pipeline in {options.out}", say):
        kept = Kept(options.out / KEPT)
        for step in first_steps(options, job):
            run_step(step, kept, say)
        file.begin(kept, say)
        for step in last_steps(options, file):
            run_step(step, kept, say)
        model = file.settle(kept, say)
    registry = registry_of(model)
    cards = [read_card(registry.path(name)) for name in file.starter.serve if name in registry.variants()]
    say(f"\n{who_serves(load_config(file.path), model, cards)}\n")
    if options.serve:
        serving = ("-m", "deploy.cli", "up", "--config", str(file.path))
        os.execve(sys.executable, [sys.executable, *serving], own_environment())
    say(f"`tiercel up --config {file.path}` serves it")


def _refuse_before_work(options: argparse.Namespace, job: Job, file: TrainedFile, say: Say) -> None:
    """Raise an error for what would stop a later step, as far as it can be known."""
    if finished(job) is None:
        fitting(job, read_modules(job.checkpoint))
    kept = Kept(options.out / KEPT)
    merged = options.out / MERGED
    foreign = [merged] if options.method != "full" and merged.exists() and kept.get("merge") is None else []
    if kept.get("train") is None:
        foreign += file.in_the_way()
    if foreign:
        raise TrainError(f"{foreign[0]} is there and was not made here; remove it, or name another --out")
    refuse_pattern(options.out.absolute(), "--out")
    _refuse_options(options, file)
    with file.of_base(job.checkpoint) as (config, model):
        refuse_unmeasurable(model)
        say_hopeless(model, len(file.starter.serve) - 1, say)
        calibration = calibration_for(model, job.checkpoint, "")
        refuse_unmakable(options, job.checkpoint, calibration, file.starter, kept)
        if file.path.exists():
            config, model = load_config(file.path), file.model()
        if options.serve:
            refuse_before_work(config, model)


def _refuse_options(options: argparse.Namespace, file: TrainedFile) -> None:
    """Raise TrainError for options that are of a step that is left out."""
    for name in ("bits", "schemes", "tries"):
        if getattr(options, name) is not None and not options.plan:
            raise TrainError(f"--{name} is of the plan, of which --no-plan makes none; leave one of them out")
    if not options.tune and not options.plan:
        raise TrainError("--no-tune is of the plan, of which --no-plan makes none; leave one of them out")
    for name in ("qat-steps", "qat-block-steps"):
        if getattr(options, name.replace("-", "_")) is not None and not options.qat:
            raise TrainError(f"--{name} is of --qat; give that as well")
    if options.qat and not options.plan and INT4 not in file.starter.serve:
        why = file.starter.left_out.get(INT4, "it is not served here")
        raise TrainError(f"--qat with --no-plan trains {INT4}: {why}; leave --no-plan out")


def first_steps(options: argparse.Namespace, job: Job) -> list[Step]:
    """From the base to a checkpoint."""
    given = _training_arguments(options)
    training = Step("train", ("train", options.method, *given), lambda: finished(job) is not None)
    if options.method == "full":
        return [training]
    base = ("--config", str(options.config), *(("--model", options.model) if options.model else ()))
    adapter, out = options.out / ADAPTER, options.out / MERGED
    arguments = ("train", "merge", str(adapter), "--out", str(out), *base)
    return [training, Step("merge", arguments, out.is_dir, lambda: adapter_sha256(adapter), makes=out)]


def last_steps(options: argparse.Namespace, file: TrainedFile) -> list[Step]:
    """From the checkpoint to what is judged: what suits the machine first, whose reference answers what
    calibrates and judges all others."""
    at = ("--config", str(file.path), "--model", file.name)

    @functools.cache
    def base() -> str:
        return base_sha256(checkpoint_of(file.model()))

    def judged(*names: str) -> Callable[[], list[Card] | None]:
        return lambda: _judged(file.model(), base(), names)

    def there(*names: str) -> Callable[[], bool]:
        return lambda: judged(*names)() is not None

    reference, *made = file.starter.serve
    recipes = [name for name in made if name in RECIPES]
    steps = []
    if recipes:
        steps.append(Step("make", ("quantize", "make", *recipes, *at), there(reference, *recipes)))
    if options.plan:
        wanted = _given(options, bits="--bits", schemes="--schemes", tries="--tries")
        wanted = wanted if options.tune else (*wanted, "--no-tune")
        arguments = ("quantize", "plan", "--name", PLANNED, *wanted, *at)
        steps.append(Step("plan", arguments, there(PLANNED), lambda: " ".join(wanted)))
    if options.qat:
        begin, name = _trained_plan(options)
        of = _given(options, qat_steps="--steps", qat_block_steps="--block-steps")

        def begun() -> str:
            return " ".join((begin, registry_of(file.model()).current(begin), *of))

        arguments = ("train", "qat", begin, "--name", name, *of, *at)
        steps.append(Step("qat", arguments, there(name), begun))
    measuring = ("quantize", "measure", *file.starter.serve, *at)
    together = judged(*file.starter.serve)
    return [*steps, Step("gate", measuring, lambda: _as_one_family(together()))]


def _trained(options: argparse.Namespace) -> Path:
    """Where the trained checkpoint will lie."""
    return Path(options.out / (MODEL if options.method == "full" else MERGED))


def _more(options: argparse.Namespace) -> tuple[str, ...]:
    """Variants beside those of recipes."""
    planned = (PLANNED,) if options.plan else ()
    return (*planned, *((_trained_plan(options)[1],) if options.qat else ()))


def _trained_plan(options: argparse.Namespace) -> tuple[str, str]:
    """What quantization-aware training begins with, and what it makes."""
    begin = PLANNED if options.plan else INT4
    return begin, f"{begin}-qat"


def _training_arguments(options: argparse.Namespace) -> list[str]:
    """The options of ``tiercel train`` as they were given to the pipeline."""
    given: list[str] = ["--config", str(options.config)]
    for name in TRAINING_OPTIONS:
        value: Any = getattr(options, name)
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            given.append(flag if value else f"--no-{name}")
        elif isinstance(value, list):
            given += [flag, *map(str, value)]
        elif value is not None:
            given += [flag, str(value)]
    return given


def _given(options: argparse.Namespace, **flags: str) -> tuple[str, ...]:
    """Those of the options that were given, as flags of a step's command."""
    given: list[str] = []
    for name, flag in flags.items():
        value = getattr(options, name)
        if value is not None:
            values = (
                value if isinstance(value, list) else [f"{value:g}" if isinstance(value, float) else value]
            )
            given += [flag, *map(str, values)]
    return tuple(given)


def _judged(model: ModelConfig, base: str, variants: Sequence[str]) -> list[Card] | None:
    """The cards of these variants of the checkpoint ``base``, each judged for every role on the items and the
    engine at hand, or not to be loaded; None where one is not."""
    registry, tasks, machine = registry_of(model), tasks_sha256(role_tasks(model)), look()
    found: list[Card] = []
    for name in variants:
        try:
            card = read_card(registry.path(name))
        except CardError:
            return None
        figures, roles = card.evaluation, model.roles.keys()
        known = figures is not None and figures.tasks_sha256 == tasks and card.gate.keys() >= roles
        if card.state == "ready" and (not known or stale(card, identity_of(card, model, machine))):
            return None
        if card.base_sha256 != base:
            return None
        found.append(card)
    return found


def _as_one_family(cards: Sequence[Card] | None) -> bool:
    """Whether they were judged with each other's gates in mind (Holm's correction)."""
    if cards is None:
        return False
    families = [card.evaluation.p_values for card in cards if card.state == "ready" and card.evaluation]
    return all(one == families[0] for one in families)
