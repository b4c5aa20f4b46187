"""``tiercel train compensate``: an adapter that makes up for what quantization lost, and its gate."""

from __future__ import annotations

import argparse
from typing import Any

from deploy.commands import add_command, add_model, print_json, run_engines, say
from deploy.commands.before import refuse_unmeasurable
from deploy.commands.quantize import TARGET_HELP, judge, unmeasured
from deploy.models import checkpoint_of, one_model, registry_of
from gateway.config import load_config

RANK = 16


def add_compensate(commands: Any) -> None:
    """The command among those of ``tiercel train``."""
    text = "put on a quantized variant an adapter that makes up for a part of what it lost, and judge both"
    command = add_command(commands, "compensate", compensate, text)
    command.add_argument(
        "begin", help="a variant, a recipe such as int4, or a scheme such as w3a16-g32-asym (simulated)"
    )
    add_model(command)
    command.add_argument("--rank", type=int, default=RANK, help=f"of the adapter ({RANK})")
    command.add_argument("--name", help="the variant's name (default: what is begun with, and -r16)")
    command.add_argument("--method", help="how a scheme is made (default: what loses least at it)")
    command.add_argument("--target", help=TARGET_HELP)
    unmeasured(command)


def compensate(options: argparse.Namespace) -> None:
    from deploy.compensating import make_compensated
    from deploy.qat_beginning import Wanted
    from deploy.unlabelled import ask_reference

    config = load_config(options.config)
    model = one_model(config, options.model)
    if options.evaluate:
        refuse_unmeasurable(model)
        run_engines(ask_reference(model, say, to_calibrate=True))
    name = options.name or f"{options.begin}-r{options.rank}"
    wanted = Wanted(options.begin, name, options.method, target=options.target)
    made = make_compensated(model, wanted, options.rank, say)
    if made.card is None:
        if options.json:
            print_json(made.as_words())
        return
    registry = registry_of(model, say)
    reference = registry.add_reference(checkpoint_of(model, say))
    judge(config, {model.name: [reference, registry.card(options.begin), made.card]}, options)
