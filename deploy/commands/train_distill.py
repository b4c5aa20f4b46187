"""``tiercel train distill``: a smaller model learns what a larger one says."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.commands import add_command, add_json, print_json, say

RATE = 5e-4
"""Learning rate where none is given."""


def add_distill(commands: Any, add_training: Callable[[argparse.ArgumentParser], None]) -> None:
    """The command among those of ``tiercel train``, with the options that all of them have."""
    text = "train a smaller model, such as `quantize compact` makes, to say what a larger one says"
    command = add_command(commands, "distill", distill, text)
    command.add_argument("teacher", help="the larger one: a checkpoint directory, or a model of the file")
    add_training(command)
    command.add_argument("--responses", type=float, default=1.0, help="weight of the KL of answers (1)")
    command.add_argument("--hidden", type=float, default=0.0, help="weight of hidden states beside it (0)")
    command.add_argument("--attention", type=float, default=0.0, help="weight of where tokens look (0)")
    command.add_argument("--answers", type=float, default=0.0, help="weight of the right answers (0)")
    command.add_argument("--temperature", type=float, default=1.0, help="of both models' answers (1)")
    add_json(command)


def distill(options: argparse.Namespace) -> None:
    from deploy.training import base_of, job_of
    from quantize.train.distill import Teaching, Weights, refuse_unlike
    from quantize.train.run import MODEL, run

    weights = Weights(
        options.responses, options.hidden, options.attention, options.answers, options.temperature
    )
    teacher, _, _ = base_of(argparse.Namespace(model=options.teacher, config=options.config))
    teaching = Teaching(teacher, weights)
    refuse_unlike(base_of(options)[0], teaching)
    options.rate = RATE if options.rate is None else options.rate
    job = dataclasses.replace(job_of(options, "full", say), teaching=teaching)
    record = run(job, say)
    if options.json:
        print_json(record)
        return
    right = record.held_out.right
    print(
        f"right answers {right.reference_good} -> {right.good} of {right.items}; the student is "
        f"{Path(options.out) / MODEL}, a checkpoint as any other"
    )
