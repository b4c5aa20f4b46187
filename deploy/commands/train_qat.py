"""``tiercel train qat``: quantization-aware training of a variant, and its gates."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deploy.commands import add_command, add_model, print_json, run_engines, say
from deploy.commands.before import refuse_unmeasurable
from deploy.commands.quantize import TARGET_HELP, judge, unmeasured
from deploy.models import checkpoint_of, one_model, registry_of
from gateway.config import load_config


def add_qat(commands: Any) -> None:
    """The command among those of ``tiercel train``."""
    text = "train a quantized variant to say what the reference says, and judge it"
    command = add_command(commands, "qat", qat, text)
    command.add_argument(
        "begin", help="a variant, a recipe such as int4, or a scheme such as w4a16-g32-asym or w3a16-g32-asym"
    )
    add_model(command)
    command.add_argument("--name", help="the variant's name (default: what is begun with, and -qat)")
    command.add_argument(
        "--data", type=Path, nargs="+", default=[], help="more text: JSON Lines of chat messages"
    )
    command.add_argument("--steps", type=int, default=300, help="of the whole model (300); 0: blocks alone")
    command.add_argument("--block-steps", type=int, default=60, help="of each block before that (60)")
    command.add_argument(
        "--rate",
        type=float,
        help="of weights, in steps of their grid (0.006 below 4 bits, else 0.0012; less of large models)",
    )
    command.add_argument("--batch", type=int, default=8, help="conversations of a step (8)")
    command.add_argument(
        "--hidden", type=float, default=0.0, help="weight of hidden states beside the KL (0)"
    )
    command.add_argument(
        "--straight-through",
        choices=("saturating", "plain"),
        default="saturating",
        help="whether gradients stop where a weight is clipped (saturating)",
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--method", help="what a scheme begins from (default: what loses least at it)")
    command.add_argument(
        "--attention", help="another scheme of attention, such as w8a8, where a scheme is begun with"
    )
    command.add_argument("--mlp", help="another scheme of the MLP, such as w4a16-g32-asym")
    command.add_argument("--kv", default="auto", help="KV-cache scheme, where a scheme is begun with")
    command.add_argument("--target", help=TARGET_HELP)
    unmeasured(command)


def qat(options: argparse.Namespace) -> None:
    from deploy.qat import train_qat
    from deploy.qat_beginning import Wanted
    from deploy.unlabelled import ask_reference
    from quantize.train.qat import QatSettings

    config = load_config(options.config)
    model = one_model(config, options.model)
    settings = QatSettings(
        steps=options.steps,
        block_steps=options.block_steps,
        learning_rate=options.rate,
        batch=options.batch,
        hidden=options.hidden,
        saturating=options.straight_through == "saturating",
        seed=options.seed,
    )
    if options.evaluate:
        refuse_unmeasurable(model)
        run_engines(ask_reference(model, say, to_calibrate=True))
    wanted = Wanted(
        options.begin,
        options.name,
        options.method,
        options.attention,
        options.mlp,
        options.kv,
        options.target,
        tuple(options.data),
    )
    card, report = train_qat(model, wanted, settings, say)
    if card is None:
        if options.json:
            print_json(report.as_words())
        return
    reference = registry_of(model, say).add_reference(checkpoint_of(model, say))
    judge(config, {model.name: [reference, card]}, options)
