"""``tiercel advise``: what to do with a model on some hardware, and what that takes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from deploy.commands import add_json, file_to_write, print_json, say
from gateway.config import Config, ModelConfig, load_config

GOALS = ("deploy", "finetune")
LOSS, CONCURRENCY, CONTEXT = 2.0, 8, 4096
"""Defaults: a gate's own margin, in per cent; requests at a time; tokens of each, at most the model's."""


def add_advise(commands: Any) -> None:
    text = "technique, precision and budget for a model, hardware and a goal, why, and the next command"
    command = commands.add_parser("advise", help=text, description=text)
    command.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a checkpoint directory, a config.json, a hub's OWNER/NAME, or a model of the YAML file",
    )
    command.add_argument(
        "--parameters", help="in place of MODEL: how many, such as 70B; a Llama-like shape is assumed"
    )
    where = command.add_mutually_exclusive_group()
    where.add_argument(
        "--gpu",
        "--gpus",
        dest="gpus",
        help="GPUs, by name or memory: 24GB, H100, 4xH100 (default: this machine)",
    )
    where.add_argument("--cpu", help="a machine without a GPU, by its free memory: 32GB")
    where.add_argument(
        "--edge", help="a device on which llama.cpp runs and vLLM does not, by its memory: 8GB"
    )
    command.add_argument("--target", help="whose rules hold (default: those of the hardware)")
    command.add_argument("--goal", choices=GOALS, default="deploy")
    command.add_argument(
        "--loss", type=float, default=LOSS, help="right answers that may be lost, per cent (2)"
    )
    command.add_argument(
        "--context", type=int, help=f"tokens of a request ({CONTEXT}, or the model's if less)"
    )
    command.add_argument("--concurrency", type=int, help=f"requests at a time ({CONCURRENCY}; with --edge 1)")
    command.add_argument(
        "--train-on",
        help="what there is to train on: none, here, or GPUs as in --gpu (default: to finetune the hardware)",
    )
    command.add_argument(
        "--config", type=Path, default=Path("tiercel.yaml"), help="the YAML file, if there is one"
    )
    command.add_argument("--out", type=file_to_write, help="write a page with pictures, too")
    command.add_argument("--brief", action="store_true", help="without the tables of memory")
    add_json(command)
    command.set_defaults(run=advise)


def advise(options: argparse.Namespace) -> None:
    """Raises ShapeError, CheckpointError, TargetError and ConfigError."""
    from deploy.advice.advise import advise as make_advice
    from deploy.advice.facts import Facts
    from deploy.advice.show import advice_page, format_advice
    from deploy.advice.steps import PLACEHOLDER, Asked
    from quantize.core.files import write_whole

    config = load_config(options.config) if options.config.is_file() else None
    model = _configured(config, options.model, options.parameters)
    shape = _shape(options.model, options.parameters, model, options.edge is not None)
    hardware = _hardware(options)
    nothing: frozenset[int] = frozenset()
    of_cards = _cards(model) if model is not None and hardware.here else ({}, nothing, nothing)
    facts = Facts(shape, hardware, _wish(options, shape.context, hardware), *of_cards)
    named = options.model or (str(model.path) if model else PLACEHOLDER)
    is_hub = options.model is not None and model is None and not Path(named).exists()
    asked = Asked(str(Path(named).parent) if Path(named).is_file() else named, model is not None, is_hub)
    found = make_advice(facts, asked)
    if options.json:
        print_json(found)
    else:
        print(format_advice(found, tables=not options.brief))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.out, advice_page(found))
        say(f"written to {options.out}")


def _configured(config: Config | None, named: str | None, parameters: str | None) -> ModelConfig | None:
    """The model of the YAML file that is meant, if it is one of it."""
    if config is None or parameters is not None:
        return None
    models = list(config.each())
    if named is None:
        return models[0] if len(models) == 1 else None
    same = (
        one for one in models if named in (one.name, one.hub) or Path(named).resolve() == one.path.resolve()
    )
    return next(same, None)


def _shape(named: str | None, parameters: str | None, model: ModelConfig | None, edge: bool) -> Any:
    from deploy.advice.config_file import like_llama, refuse_unadvised
    from deploy.models import checkpoint_of
    from quantize.core.checkpoint import open_checkpoint
    from quantize.core.shape import (
        ShapeError,
        parameters_of,
        shape_of_checkpoint,
        shape_of_config,
        shape_of_parameters,
    )

    if named is not None and parameters is not None:
        raise ShapeError(f"--parameters {parameters} and {named} are two models; give one of them")
    if parameters is not None:
        return shape_of_parameters(parameters_of(parameters))
    if model is not None:
        checkpoint = checkpoint_of(model, say)
        refuse_unadvised(checkpoint.config, model.name, edge)
        return shape_of_checkpoint(checkpoint)
    if named is None:
        raise ShapeError("which model? give a directory, a hub's OWNER/NAME, or --parameters 7B")
    path = Path(named)
    if path.is_dir() and not any(path.glob("*.safetensors*")) and (path / "config.json").is_file():
        path = path / "config.json"
    is_hub = named.count("/") == 1 and not named.startswith((".", "/", "~"))
    if path.is_file() or (is_hub and not path.is_dir()):
        config = _read(path) if path.is_file() else _fetched(named)
        refuse_unadvised(config, named, edge)
        return shape_of_config(like_llama(config, named), named)
    if path.is_dir():
        checkpoint = open_checkpoint(path)
        refuse_unadvised(checkpoint.config, named, edge)
        return shape_of_checkpoint(checkpoint)
    raise ShapeError(
        f"{named}: no such directory; give a checkpoint's, a hub's OWNER/NAME, or --parameters 7B"
    )


def _read(path: Path) -> dict[str, Any]:
    from quantize.core.shape import ShapeError

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ShapeError(f"{path} is no config.json ({error}); give the file of a checkpoint") from None
    if not isinstance(found, dict):
        raise ShapeError(f"{path} holds no JSON object; give the config.json of a checkpoint")
    return found


def _fetched(repository: str) -> dict[str, Any]:
    """A hub's ``config.json`` alone."""
    import os

    from huggingface_hub import hf_hub_download

    from quantize.core.shape import ShapeError

    try:
        return _read(Path(hf_hub_download(repository, "config.json", endpoint=os.environ.get("HF_ENDPOINT"))))
    except ShapeError:
        raise
    except Exception as error:  # whatever the hub's client raises, nothing came
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ShapeError(
            f"{repository}: its config.json cannot be fetched ({first}); give a directory, or --parameters 7B"
        ) from None


def _hardware(options: argparse.Namespace) -> Any:
    from deploy.advice.hardware import described_cpu, described_edge, described_gpus, this_machine

    if options.gpus is not None:
        return described_gpus(options.gpus, options.target)
    if options.cpu is not None:
        return described_cpu(options.cpu, options.target)
    if options.edge is not None:
        return described_edge(options.edge)
    return this_machine(options.target)


def _wish(options: argparse.Namespace, longest: int, hardware: Any) -> Any:
    from deploy.advice.facts import Wish
    from deploy.advice.hardware import described_gpus, this_machine
    from quantize.core.shape import ShapeError

    usual = 1 if hardware.kind == "edge" else CONCURRENCY
    concurrency = usual if options.concurrency is None else options.concurrency
    for name, value, least in (("loss", options.loss, 0), ("concurrency", concurrency, 1)):
        if not least <= value < 1e6 or (name == "loss" and value > 100):
            raise ShapeError(
                f"--{name} {value:g}: must be from {least} to {100 if name == 'loss' else 999999}"
            )
    context = min(CONTEXT, longest) if options.context is None else options.context
    if not 1 <= context <= longest:
        raise ShapeError(f"--context {context}: the model takes 1 to {longest:,} tokens; give one of these")
    if options.train_on in (None, "none"):
        nothing = options.train_on == "none" or options.goal == "deploy" or hardware.kind == "edge"
        training = None if nothing else hardware
    else:
        training = (
            this_machine()
            if options.train_on == "here"
            else described_gpus(options.train_on, option="--train-on")
        )
    return Wish(options.goal, options.loss, context, concurrency, training)


def _cards(model: ModelConfig) -> tuple[dict[str, str], frozenset[int], frozenset[int]]:
    """What the cards of measured variants say, by variant; weight bits of which each one failed for every
    role; and those of which one passed for some."""
    from deploy.models import registry_of
    from quantize.card import CardError, Outcome
    from quantize.report.tables import kl_text

    registry = registry_of(model)
    said: dict[str, str] = {}
    verdicts: dict[int, set[Outcome]] = {}
    for variant in registry.variants():
        try:
            card = registry.card(variant)
        except CardError:
            continue
        if card.evaluation is None or variant == card.reference:
            continue
        speed = f", {card.speed.tokens_per_s:.0f} tokens/s" if card.speed else ""
        roles = f"passes for {', '.join(sorted(card.passed))}" if card.passed else "passes for no role"
        said[variant] = f"{card.id}: KL {kl_text(card.evaluation.text.kl_mean)}{speed}, {roles}"
        bits = next(bits for bits in (4, 8, 16) if card.weight_bits <= bits or bits == 16)
        verdicts.setdefault(bits, set()).update(verdict.outcome for verdict in card.gate.values())
    failed = {bits for bits, found in verdicts.items() if found == {Outcome.FAILED} and bits < 16}
    return said, frozenset(failed), frozenset(b for b, found in verdicts.items() if Outcome.PASSED in found)
