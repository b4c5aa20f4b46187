"""Commands of ``tiercel`` on a tiny model that may be killed at a chosen point; the engine that a plan is
measured on is a scripted one.

    python -m tests.deploy.training_process DIRECTORY

trains an adapter in ``DIRECTORY``, merges it, plans a mixture for what was merged, and trains that. A command
is given once for every point of ``POINTS`` that is its own, where its process sends itself SIGKILL, so that
nothing is tidied up; then without; and, for comparison, undisturbed to another place. Prints what every
process ended with. All are forks of one that has only imported.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import peft  # noqa: F401
import transformers  # noqa: F401

import deploy.planning
import quantize.train.qat_export
from deploy.cli import main as tiercel
from gateway.config import ModelConfig
from quantize.train import loop, merge
from tests.quantize.planning_process import ScriptedBench, die

SHORT = ("--steps", "2", "--batch", "4", "--rank", "2", "--length", "64", "--device", "cpu")
QUICK = ("--steps", "4", "--block-steps", "2", "--batch", "4", "--rate", "0.2", "--no-evaluate")
COMMANDS = {
    "train": ("train", "lora", "--role", "intents", "--model", "base", "--out", "run", *SHORT),
    "merge": ("train", "merge", "run/adapter", "--model", "base", "--out", "run/merged"),
    "merge-undisturbed": ("train", "merge", "run/adapter", "--model", "base", "--out", "run/undisturbed"),
    "plan": ("quantize", "plan", "--model", "merged", "--bits", "6", "--tries", "2", "--no-evaluate"),
    "qat": ("train", "qat", "planned", "--model", "merged", *QUICK),
    "qat-undisturbed": ("train", "qat", "planned", "--name", "undisturbed", "--model", "merged", *QUICK),
}
POINTS = {
    "merge": ("merge-half",),
    "qat": ("qat-second-block", "qat-whole", "qat-half-written"),
}
PLANNED_WITH = ("w4a16-g32-asym", "w8a8")


def _before(module: Any, name: str, when: Callable[..., bool]) -> None:
    """Let this process die before the first call of a function for which ``when`` is true."""
    whole = getattr(module, name)

    def dying(*args: Any, **more: Any) -> Any:
        if when(*args, **more):
            die()
        return whole(*args, **more)

    setattr(module, name, dying)


def killing(point: str) -> None:
    """Let this process die at the point."""
    calls = iter(range(1000))

    def in_step(run: Any, step: int, *_: Any) -> bool:
        at = (run.place.directory.name, step)
        return at == {"qat-second-block": ("block-1", 1), "qat-whole": ("whole", 3)}[point]

    match point:
        case "merge-half":
            _before(merge, "overwrite", lambda *_: next(calls) == 3)
        case "qat-second-block" | "qat-whole":
            _before(loop._Run, "step", in_step)
        case "qat-half-written":
            _before(quantize.train.qat_export, "prove", lambda *_: True)


def give(command: str, point: str) -> None:
    """Give a command, whose process may die at the point."""
    killing(point)
    bench = ScriptedBench("")

    @contextlib.contextmanager
    def open_bench(_model: ModelConfig) -> Iterator[ScriptedBench]:
        yield bench

    deploy.planning.open_bench = open_bench  # type: ignore[assignment]
    more = ("--no-tune", "--schemes", *PLANNED_WITH) if command == "plan" else ()
    tiercel((*COMMANDS[command], *more))


def main(directory: str) -> None:
    os.chdir(directory)
    for command in COMMANDS:
        for point in (*POINTS.get(command, ()), ""):
            if (child := os.fork()) == 0:
                try:
                    give(command, point)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            print(f"ended {point or command} {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
