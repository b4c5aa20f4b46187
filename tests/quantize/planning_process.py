"""Processes that plan on a tiny model and may be killed at a chosen point; the engine is a scripted one.

    python -m tests.quantize.planning_process DIRECTORY [POINT …]

plans in ``DIRECTORY`` once for every ``POINT``, one of ``POINTS``, where that process sends itself SIGKILL,
so that nothing is tidied up; and then without. Prints what every process ended with. All are forks of one
that has only imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import deploy.planning
import quantize.plan.sensitivity
from gateway.config import ModelConfig, load_config
from quantize.evaluate.bench import Scores, Span
from quantize.make import parts

POINTS = ("row", "reference", "search", "checkpoint")
UNIFORM = 2
"""Schemes to plan with, whose uniform variants are measured first."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class ScriptedBench:
    """Says of a checkpoint what its quantization config decides, and counts what it is asked."""

    identity = version = "scripted"

    def __init__(self, point: str) -> None:
        self.point, self.asked = point, 0

    def score(self, directory: Path, spans: Sequence[Span], save: Path | None = None, **_more: Any) -> Scores:
        tokens = sum(len(tokens) - start for tokens, start in spans)
        if save:
            partial = save.with_name(save.name + ".partial")
            partial.write_bytes(b"half")
            if self.point == "reference":
                die()
            partial.write_bytes(b"whole")
            partial.rename(save)
        else:
            self.asked += 1
            if self.point == "search" and self.asked > UNIFORM:
                die()
        digest = hashlib.sha256((directory / "config.json").read_bytes()).digest()
        kl = np.full(tokens, 0.01 * (1 + digest[0] / 256))
        return Scores(np.zeros(tokens), kl, np.zeros(tokens), 0.0, 0.0)


def killing(point: str) -> None:
    """Let this process die at the point, if it is one of those outside the engine."""

    def at(module: Any, name: str, after: int, half: Callable[[Path], None]) -> None:
        whole, calls = getattr(module, name), 0

        def counted(*args: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                half(next(one for one in args if isinstance(one, Path)))
                die()
            return whole(*args, **more)

        setattr(module, name, counted)

    def torn(path: Path) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write('{"group": "model.lay')

    match point:
        case "row":
            at(quantize.plan.sensitivity, "append_kept", 1, torn)
        case "checkpoint":
            at(parts, "write_shards", 0, lambda out: (out / "model.safetensors.partial").touch())


def plan(directory: str, point: str) -> None:
    """Plan with the configuration in ``directory``."""
    killing(point)
    bench = ScriptedBench(point)

    @contextlib.contextmanager
    def open_bench(_model: ModelConfig) -> Iterator[ScriptedBench]:
        yield bench

    deploy.planning.open_bench = open_bench  # type: ignore[assignment]
    model = load_config(Path(directory) / "tiercel.yaml").of("m")
    wanted: dict[str, Any] = {
        "target_name": "vllm-cpu-vnni",
        "bits": 5,
        "tries": 3,
        "tuned": False,
        "methods": ("imatrix",),
    }
    deploy.planning.plan(model, "planned", print, schemes=("w4a16-g32", "w8a8"), **wanted)


def main(directory: str, *points: str) -> None:

    for point in (*points, ""):
        if (child := os.fork()) == 0:
            try:
                plan(directory, point)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(f"{point or 'end'} {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
