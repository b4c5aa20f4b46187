"""``tiercel train pipeline``: train → merge → plan → QAT → gate → serve, each step a command of its own.

Every step is in a process of its own, which leaves no memory taken, and can be given alone. What is finished
is not done again: the same command goes on where it was stopped, within a step as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deploy.models import registry_of
from deploy.starting import arrive
from deploy.training import job_of, lines_of
from gateway.config import load_config
from quantize.card import CardError, read_card
from quantize.core.files import write_whole
from quantize.core.recipes import RECIPES
from quantize.train.data import as_item
from quantize.train.loop import TrainError
from quantize.train.run import ADAPTER, MODEL

Say = Callable[[str], None]

MERGED, FILE, ITEMS, PLANNED = "merged", "tiercel.yaml", "items.jsonl", "planned"
ELSEWHERE = ("models", "canary", "record", "like")
"""Settings of a role that are about the fleet that it was in."""


@dataclass(frozen=True)
class Step:
    """A command of ``tiercel``, and whether it has been done."""

    name: str
    arguments: tuple[str, ...]
    is_done: Callable[[], bool] = lambda: False


def run_pipeline(options: argparse.Namespace, say: Say) -> None:
    """All steps that are not done, one after another. Raises TrainError, and before any work whatever the
    first step refuses."""
    job_of(options, options.method, lambda _text: None)
    for step in first_steps(options):
        _run(step, say)
    path = _configuration(options, say)
    for step in last_steps(options, path):
        _run(step, say)
    if options.serve:
        os.execv(sys.executable, [sys.executable, "-m", "deploy.cli", "up", "--config", str(path)])
    say(f"`tiercel up --config {path}` serves it")


def first_steps(options: argparse.Namespace) -> list[Step]:
    """From the base to a checkpoint."""
    given = _training_arguments(options)
    steps = [Step("train", ("train", options.method, *given))]
    if options.method != "full":
        base = ("--config", str(options.config), *(("--model", options.model) if options.model else ()))
        adapter, out = options.out / ADAPTER, options.out / MERGED
        merging = ("train", "merge", str(adapter), "--out", str(out), *base)
        steps.append(Step("merge", merging, lambda: _is_newer(out, adapter)))
    return steps


def last_steps(options: argparse.Namespace, path: Path) -> list[Step]:
    """From the checkpoint to what is judged: what suits the machine first, whose reference answers what
    calibrates and judges all others."""
    at = ("--config", str(path))

    def done(*variants: str) -> Callable[[], bool]:
        return lambda: _are_judged(path, variants)

    recipes = [name for name in load_config(path).each()[0].serve if name in RECIPES]
    steps = [Step("make", ("quantize", "make", *recipes, *at), done(*recipes))]
    if options.plan:
        bits = ("--bits", str(options.bits)) if options.bits else ()
        steps.append(Step("plan", ("quantize", "plan", "--name", PLANNED, *bits, *at), done(PLANNED)))
    if options.qat:
        begin, name = _trained_plan(options)
        steps.append(Step("qat", ("train", "qat", begin, "--name", name, *at), done(name)))
    steps.append(Step("gate", ("quantize", "measure", *at), done()))
    return steps


def _trained_plan(options: argparse.Namespace) -> tuple[str, str]:
    """What quantization-aware training begins with, and what it makes."""
    begin = PLANNED if options.plan else "int4"
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


TRAINING_OPTIONS = (
    *("model", "role", "data", "held_out", "out", "memory", "epochs", "steps", "rate", "batch", "together"),
    *("length", "rank", "alpha", "dropout", "targets", "judge", "evaluate_every", "keep_every", "seed"),
    *("device", "checkpointing"),
)


def _run(step: Step, say: Say) -> None:
    if step.is_done():
        say(f"{step.name}: done before")
        return
    say(f"{step.name}: tiercel {' '.join(step.arguments)}")
    process = subprocess.Popen([sys.executable, "-m", "deploy.cli", *step.arguments], stdout=sys.stderr)
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the terminal has told the step as well, which keeps what is done
        process.wait()
        raise
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise TrainError(f"{step.name} failed, for the reason above; the same command goes on with it")


def _is_newer(made: Path, source: Path) -> bool:
    """Whether a checkpoint was made of an adapter that has not changed since."""
    weights = source / "adapter_model.safetensors"
    return made.is_dir() and made.stat().st_mtime >= weights.stat().st_mtime


def _are_judged(path: Path, variants: Sequence[str]) -> bool:
    """Whether these, or all that are there, have been judged for every role, or cannot be loaded."""
    model = load_config(path).each()[0]
    registry = registry_of(model)
    for name in variants or registry.variants():
        try:
            card = read_card(registry.path(name))
        except CardError:
            return False
        if card.state == "ready" and not card.gate.keys() >= model.roles.keys():
            return False
    return bool(registry.variants())


def _configuration(options: argparse.Namespace, say: Say) -> Path:
    """A file for the trained model: its own variants, and of the roles the one that it was trained for."""
    path = Path(options.out / FILE).absolute()
    if path.exists():
        say(f"going on with {path}, which is there")
        return path
    source = (options.out / (MODEL if options.method == "full" else MERGED)).absolute()
    starter = arrive(str(source), path.parent, say).starter
    serve = [*starter.serve, *_more(options)]
    name = f"{options.role or options.data.stem}-{options.method}"
    made: dict[str, Any] = {
        "models": {name: {"path": str(source), "serve": serve}},
        "variants_dir": str(path.parent / "variants"),
        "roles": _roles(options),
        "default_role": options.role or "default",
    }
    if engine := _engine(options, starter.python):
        made["engine"] = engine
    write_whole(path, yaml.safe_dump(made, sort_keys=False, allow_unicode=True))
    load_config(path)
    say(f"wrote {path}: variants {', '.join(serve)}")
    return path


def _more(options: argparse.Namespace) -> Sequence[str]:
    planned = [PLANNED] if options.plan else []
    return [*planned, _trained_plan(options)[1]] if options.qat else planned


def _roles(options: argparse.Namespace) -> dict[str, Any]:
    """The role that was trained for, with what the configuration says of it; without one, a role of what was
    held out."""
    if options.role is not None:
        role = load_config(options.config).roles[options.role]
        said = json.loads(role.model_dump_json(exclude_unset=True))
        return {options.role: {key: value for key, value in said.items() if key not in ELSEWHERE}}
    items = options.out / ITEMS
    _, held_out, _ = lines_of(options, None, None)
    texts = (as_item(line).model_dump_json(exclude_defaults=True) for line in held_out)
    write_whole(items, "".join(f"{text}\n" for text in texts))
    return {"default": {"tasks": str(items.absolute())}}


def _engine(options: argparse.Namespace, python: Path | None) -> dict[str, Any]:
    """What the configuration says of engines, and where theirs is if it is not beside the file."""
    found: dict[str, Any] = {"python": str(python)} if python is not None else {}
    if options.config.exists():
        found |= json.loads(load_config(options.config).engine.model_dump_json(exclude_unset=True))
    return found
