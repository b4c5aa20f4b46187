"""``tiercel train``: LoRA, QLoRA, all weights; merge, adopt, split; all steps to serving as one."""

from __future__ import annotations

import argparse
from pathlib import Path

from deploy.commands import add_command, add_json, print_json, say
from deploy.commands.quantize import before_work, judge, unmeasured
from deploy.commands.train_compensate import add_compensate
from deploy.commands.train_distill import add_distill
from deploy.commands.train_qat import add_qat
from gateway.config import ModelConfig, load_config

METHODS = {
    "lora": "train an adapter on a frozen model",
    "qlora": "train an adapter on a frozen model that is kept in 4 bits (NF4, double quantization)",
    "full": "train all weights",
}
MODEL_HELP = "a checkpoint directory, or a model of the file (default: the only one)"


def add_train(parser: argparse.ArgumentParser) -> None:
    """The commands of ``tiercel train``."""
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, text in METHODS.items():
        training = add_command(commands, name, train, text)
        add_training(training)
        training.set_defaults(method=name)
        add_json(training)

    add_distill(commands, add_training)
    add_qat(commands)
    add_compensate(commands)
    text = "write a model with an adapter merged into it, as a checkpoint like any other"
    merging = add_command(commands, "merge", merge, text)
    merging.add_argument("adapter", type=Path, help="a directory in PEFT's format")
    merging.add_argument("--model", help=MODEL_HELP)
    merging.add_argument("--out", type=Path, required=True, help="the directory to write")

    text = "put an adapter on a quantized variant of its base, and gate that beside the merged model"
    carrying = add_command(commands, "carry", carry, text)
    carrying.add_argument("adapter", type=Path, help="a directory in PEFT's format")
    carrying.add_argument("carrier", help="model:variant of the base that carries it, such as base:int8")
    carrying.add_argument("name", help="the variant's name")
    carrying.add_argument("--model", required=True, help="the merged model, whose variant it becomes")
    unmeasured(carrying)

    text = "train, merge, plan, perhaps train the plan (QAT), gate and serve: goes on where it was stopped"
    whole = add_command(commands, "pipeline", pipeline, text)
    whole.add_argument("method", choices=tuple(METHODS), help="how it is trained")
    add_training(whole)
    whole.add_argument("--bits", type=float, help="bits per weight of the plan (default: 4.5)")
    whole.add_argument("--schemes", nargs="+", help="what the plan chooses from (the target's usual)")
    whole.add_argument("--tries", type=int, help="plans that are measured on the engine (12)")
    whole.add_argument("--no-tune", dest="tune", action="store_false", help="keep the plan's scales as found")
    whole.add_argument("--no-plan", dest="plan", action="store_false", help="the machine's recipes alone")
    whole.add_argument("--qat", action="store_true", help="train the plan's integers as well")
    whole.add_argument("--qat-steps", type=int, help="of it, of the whole model (300)")
    whole.add_argument("--qat-block-steps", type=int, help="of it, of each block before that (60)")
    whole.add_argument("--no-serve", dest="serve", action="store_false", help="end with the gates")

    text = "divide a file of items or conversations into what trains and what judges"
    splitting = add_command(commands, "split", split, text)
    splitting.add_argument("file", type=Path, help="JSON Lines")
    splitting.add_argument("--one-in", type=int, default=5, help="of so many questions one judges (5)")


def add_training(command: argparse.ArgumentParser) -> None:
    """What is trained on, how, and where it goes."""
    command.add_argument("--model", help=MODEL_HELP)
    command.add_argument("--role", help="train for a role: on its training items, judged by its tasks")
    command.add_argument("--data", type=Path, help="train on JSON Lines of chat messages or items")
    command.add_argument("--held-out", type=Path, help="what judges, with --data (default: one line in ten)")
    command.add_argument("--out", type=Path, required=True, help="the run's directory")
    command.add_argument("--memory", type=float, help="GB that may be taken beside the program itself")
    command.add_argument("--epochs", type=float, default=3.0, help="times that each example is seen (3)")
    command.add_argument("--steps", type=int, help="steps, in place of --epochs")
    command.add_argument("--rate", type=float, help="learning rate (2e-4; of full: 2e-5)")
    command.add_argument("--batch", type=int, default=16, help="examples of a step (16)")
    command.add_argument("--together", type=int, default=8, help="of them, at once in memory (8)")
    command.add_argument("--length", type=int, help="longest example, tokens (1024)")
    command.add_argument("--rank", type=int, default=16, help="of the adapter (16)")
    command.add_argument("--alpha", type=float, help="of the adapter (twice its rank)")
    command.add_argument("--dropout", type=float, default=0.0, help="before the adapter (0)")
    command.add_argument("--targets", nargs="+", help="modules with an adapter, such as q_proj (all linear)")
    command.add_argument("--judge", type=int, default=200, help="held-out examples that judge (200)")
    command.add_argument("--evaluate-every", type=int, default=0, help="steps (at begin and end alone)")
    command.add_argument("--keep-every", type=int, default=20, help="steps between checkpoints (20)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", help="such as cpu or cuda (default: the accelerator if there is one)")
    command.add_argument(
        "--nf4",
        choices=("tiercel", "bitsandbytes"),
        help="whose 4-bit modules qlora keeps the base in (bitsandbytes' on a GPU where it is installed)",
    )
    command.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="compute blocks again instead of keeping their values (default: where --memory asks for it)",
    )


def train(options: argparse.Namespace) -> None:
    from deploy.training import job_of
    from quantize.train.run import run

    record = run(job_of(options, options.method, say), say)
    if options.json:
        print_json(record)
        return
    right = record.held_out.right
    print(f"right answers {right.reference_good} -> {right.good} of {right.items}, in {options.out}")


def merge(options: argparse.Namespace) -> None:
    from deploy.training import base_of
    from quantize.train import merge as merging

    checkpoint, _, _ = base_of(options)
    merging.merge(checkpoint, options.adapter, options.out, merging.record_of(options.adapter))
    say(f"{options.out} is a checkpoint: `tiercel up {options.out}`, or a model of the file")


def carry(options: argparse.Namespace) -> None:
    from deploy.training import carried

    config = load_config(options.config)

    def before(model: ModelConfig) -> None:
        before_work(model, options)(False)

    judge(config, carried(config, options, say, before), options)


def pipeline(options: argparse.Namespace) -> None:
    from deploy.pipeline import run_pipeline

    run_pipeline(options, say)


def split(options: argparse.Namespace) -> None:
    from deploy.training import split_file

    split_file(options.file, options.one_in, say)
