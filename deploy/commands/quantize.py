"""``tiercel quantize``: check, make, measure, sensitivity, explore, plan, register."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from deploy.commands import NOT_WELL, add_command, add_json, add_model, print_json, run_engines, say
from deploy.commands.before import refuse_unmeasurable
from deploy.commands.compact import add_compact
from deploy.commands.explore import add_explore
from deploy.commands.stress import add_stress
from deploy.commands.variants import card_as_json
from deploy.models import checkpoint_of, one_model, registry_of, some_models, variant_of, variants_to_make
from deploy.placement import MOST_RANKS
from gateway.config import Config, ConfigError, ModelConfig, load_config
from quantize.card import Card
from quantize.core.checkpoint import open_checkpoint
from quantize.core.methods import refuse_trained
from quantize.core.modules import read_modules
from quantize.core.plan import Plan
from quantize.core.recipes import RECIPES, unasked, usual_method
from quantize.core.schemes import kv_scheme, scheme
from quantize.core.targets import detect, target
from quantize.plan.controls import KINDS

COMMANDS = (
    *("check", "make", "measure", "sensitivity", "explore", "compact", "plan", "register"),
    *("robustness", "soak"),
    *("-h", "--help"),
)
TARGET_HELP = "where it is to be loaded (default: this machine)"


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """The commands of ``tiercel quantize``; ``make`` is the one when none is named."""
    commands = parser.add_subparsers(required=True, metavar="command")
    text = "what a model can be on a target, before any work"
    checking = commands.add_parser("check", help=text, description=text)
    checking.add_argument("model", type=Path, help="a checkpoint directory")
    checking.add_argument("--target", help=TARGET_HELP)
    checking.add_argument("--tensor-parallel", type=int, default=1, help="ranks of each matrix")
    checking.add_argument(
        "--calibration",
        type=Path,
        help="JSON Lines of conversations, for the estimate of time (default: those of Tiercel)",
    )
    add_json(checking)
    checking.set_defaults(run=check)

    making = add_command(
        commands, "make", make, "make variants, measure and judge them, one model after another"
    )
    add_model(making, "all")
    suited = f"which of {', '.join(RECIPES)} (default: those that suit the target)"
    making.add_argument("variants", nargs="*", help=suited)
    making.add_argument("--scheme", help="make one variant of this scheme instead, such as w4a16-g64")
    making.add_argument("--method", help="how, with --scheme (default: what loses least at that scheme)")
    making.add_argument("--kv", default="auto", help="KV-cache scheme, with --scheme")
    making.add_argument("--name", help="the variant's name, with --scheme")
    making.add_argument("--target", help=TARGET_HELP)
    unmeasured(making)

    text = "measure and judge variants that are there, on the engine at hand, one model after another"
    measuring = add_command(commands, "measure", measure, text)
    add_model(measuring, "all")
    measuring.add_argument("variants", nargs="*", help="which (default: all)")
    add_json(measuring)
    measuring.set_defaults(evaluate=True)

    looking = add_command(commands, "sensitivity", sensitivity, "what each group loses at each scheme")
    add_model(looking)
    looking.add_argument("--target", help=TARGET_HELP)
    add_json(looking)

    add_explore(commands)
    add_compact(commands)
    _add_plan(commands)
    add_stress(commands)

    registering = add_command(
        commands, "register", register, "take in a checkpoint that was quantized elsewhere, and gate it"
    )
    add_model(registering)
    text = "a directory in compressed-tensors, AWQ, GPTQ or AutoRound format, or a GGUF file"
    registering.add_argument("directory", type=Path, help=text)
    registering.add_argument("name", help="the variant's name")
    unmeasured(registering)


def _add_plan(commands: Any) -> None:
    planning = add_command(commands, "plan", plan, "find and make the best mixture within a budget")
    add_model(planning)
    wanted = planning.add_mutually_exclusive_group()
    wanted.add_argument("--bits", type=float, help="bits per weight, scales included (default: 4.5)")
    wanted.add_argument("--bytes", type=int, help="bytes of all weights, and of the KV cache if asked for")
    wanted.add_argument("--loss", type=float, help="the fewest bytes with at most this KL, nats per token")
    planning.add_argument("--name", default="planned", help="the variant's name (default: planned)")
    planning.add_argument("--target", help=TARGET_HELP)
    planning.add_argument("--kv", nargs="+", default=["auto"], help="KV-cache schemes to choose from")
    planning.add_argument("--concurrency", type=int, default=0, help="requests whose cache counts in --bytes")
    planning.add_argument("--context", type=int, default=0, help="tokens of each of those")
    planning.add_argument("--tries", type=int, default=12, help="plans that are measured on the engine")
    planning.add_argument("--no-tune", dest="tune", action="store_false", help="keep scales as they come")
    planning.add_argument("--schemes", nargs="+", help="what to choose from (default: the target's usual)")
    planning.add_argument(
        "--methods", nargs="+", help="whose parts may be mixed (default: smooth+imatrix+gptq)"
    )
    planning.add_argument(
        "--controls",
        nargs="*",
        choices=KINDS,
        help="measure plans made without a planner beside it, on held-out conversations (default: all kinds)",
    )
    unmeasured(planning)


def unmeasured(command: argparse.ArgumentParser) -> None:
    """Let a command that makes a variant leave it unmeasured, and give its result as JSON."""
    command.add_argument(
        "--no-evaluate", dest="evaluate", action="store_false", help="only make it, without a gate"
    )
    add_json(command)


def with_make(arguments: Sequence[str]) -> list[str]:
    """``tiercel quantize int8`` is short for ``tiercel quantize make int8``."""
    given = list(arguments)
    if given[:1] == ["quantize"] and (len(given) == 1 or given[1] not in COMMANDS):
        given.insert(1, "make")
    return given


def _model(options: argparse.Namespace) -> tuple[Config, ModelConfig]:
    config = load_config(options.config)
    return config, one_model(config, options.model)


def check(options: argparse.Namespace) -> None:
    from deploy.unlabelled import usual_lengths
    from quantize.check import check_report, format_check, refuse_unfit
    from quantize.make.calibration import read_calibration

    if not 1 <= options.tensor_parallel <= MOST_RANKS:
        raise ConfigError(f"--tensor-parallel {options.tensor_parallel}: give 1 to {MOST_RANKS}")
    checkpoint = open_checkpoint(options.model)
    refuse_unfit(checkpoint)
    if options.calibration:
        lengths = list(map(len, read_calibration(options.calibration, checkpoint).sequences))
    else:
        lengths = usual_lengths(checkpoint)
    report = check_report(
        checkpoint,
        target(options.target or detect()),
        tensor_parallel=options.tensor_parallel,
        calibration=lengths,
        shipped=options.calibration is None,
    )
    if options.json:
        print_json(report)
    else:
        print(format_check(report))


def make(options: argparse.Namespace) -> None:
    from deploy.making import make_one, make_variants
    from quantize.export.encoder import is_encoder

    config = load_config(options.config)
    if options.scheme:
        model = one_model(config, options.model)
        scheme(options.scheme)
        kv_scheme(options.kv)
        method = options.method or usual_method(options.scheme)
        refuse_trained(method)
        before = before_work(model, options)
        name, kv = options.name, options.kv
        cards = {model.name: make_one(model, name, options.scheme, method, kv, say, options.target, before)}
    else:
        cards, encoder = {}, ""
        for name, variants in variants_to_make(config, options.variants, options.model).items():
            model = config.of(name)
            if len(config.models) > 1:
                say(f"{name}:")
            if is_encoder(checkpoint_of(model, say).config):
                encoder = (
                    f"{name} is an encoder, whose variants `tiercel export encoder --model {name}` makes"
                )
                say(encoder)
                continue
            wanted = variants or unasked(target(options.target or detect()))
            before = before_work(model, options, len(wanted))
            cards[name] = make_variants(model, wanted, say, options.target, before)
    if not cards:
        raise ConfigError(encoder)
    judge(config, cards, options)


def measure(options: argparse.Namespace) -> None:
    """The named variants, each beside its model's reference; without any, all of one model or of all."""
    from deploy.measuring import say_hopeless

    config = load_config(options.config)
    wanted: dict[str, list[str]] = {}
    for name in options.variants:
        model, variant = variant_of(config, name, options.model)
        wanted.setdefault(model.name, []).append(variant)
    if not wanted:
        wanted = {one.name: [] for one in some_models(config, options.model)}
    cards = {}
    for model in map(config.of, wanted):
        registry = registry_of(model, say)
        if not (names := wanted[model.name] or registry.variants()) and len(wanted) > 1:
            say(f"{model.name}: no variants; make them with `tiercel quantize --model {model.name}`")
            continue
        others = [name for name in dict.fromkeys(names) if name != model.reference]
        cards[model.name] = [registry.to_measure(name) for name in (model.reference, *others)]
        say_hopeless(model, len(others), say)
    judge(config, cards, options)


def sensitivity(options: argparse.Namespace) -> None:
    from deploy.planning import format_sensitivity, sensitivity

    found, path = sensitivity(_model(options)[1], options.target)
    if options.json:
        print_json(found)
    else:
        print(format_sensitivity(found))
    say(f"written to {path}")


def plan(options: argparse.Namespace) -> None:
    from deploy.planning import plan

    config, model = _model(options)
    for method in options.methods or ():
        refuse_trained(method)
    for name in options.schemes or ():
        scheme(name)
    card, _ = plan(
        model,
        options.name,
        say,
        target_name=options.target,
        bits=options.bits,
        budget=options.bytes,
        loss=options.loss,
        kv=options.kv,
        kv_tokens=options.concurrency * options.context,
        tries=options.tries,
        methods=options.methods,
        schemes=options.schemes,
        tuned=options.tune,
        compare_with=KINDS if options.controls == [] else options.controls or (),
        before=partial(before_work(model, options), True),
    )
    judge(config, {model.name: [reference_card(model), card]}, options)


def register(options: argparse.Namespace) -> None:
    from quantize.check import refuse_pattern, refuse_unfit

    config, model = _model(options)
    checkpoint = checkpoint_of(model, say)
    refuse_pattern(model.variants_dir)
    refuse_unfit(checkpoint)
    for note in checkpoint.notes:
        say(note)
    if options.evaluate:
        refuse_unmeasurable(model)
    reference = reference_card(model)
    registry = registry_of(model, say)
    if options.directory.suffix == ".gguf":
        from quantize.export.variant import register_gguf

        card = register_gguf(registry, checkpoint, options.directory, options.name)
    else:
        card = registry.register(options.directory, options.name, checkpoint, target(detect()))
    if card.schemes:
        found = target(detect()).check_plan(
            Plan(groups=card.schemes, kv=card.kv), read_modules(checkpoint), checkpoint.head_dim
        )
        for problem in found:
            say(f"{options.name} may not load here: {problem}")
    before_work(model, options)(False)
    judge(config, {model.name: [reference, card]}, options)


def before_work(model: ModelConfig, options: argparse.Namespace, variants: int = 1) -> Callable[[bool], None]:
    """What is done before work, for so many variants that are to be measured: a look at what may stop it, and
    the reference's answers to what judges them and, where it is told that they are needed, calibrates them.
    """

    def look(to_calibrate: bool) -> None:
        from deploy.measuring import say_hopeless
        from deploy.unlabelled import ask_reference

        refuse_unmeasurable(model)
        say_hopeless(model, variants, say)
        run_engines(ask_reference(model, say, to_calibrate=to_calibrate))

    return look if options.evaluate else lambda _to_calibrate: None


def reference_card(model: ModelConfig) -> Card:
    """The reference, taken in if it was not yet."""
    return registry_of(model, say).add_reference(checkpoint_of(model, say))


def judge(config: Config, cards: Mapping[str, Sequence[Card]], options: argparse.Namespace) -> None:
    """Measure and judge cards, by model, where that is asked for, and show them."""
    from quantize.report.tables import format_variants

    shown = [card for of_model in cards.values() for card in of_model]
    if options.evaluate:
        from deploy.evaluation import evaluate_models

        shown = run_engines(evaluate_models(config, cards, say))
    if options.json:
        print_json([card_as_json(card) for card in shown])
    for model in cards if not options.json else ():
        table = format_variants([card for card in shown if card.model == model])
        print(f"{model}\n{table}" if len(cards) > 1 else table)
    if options.evaluate and any(card.evaluation is None and card.state == "ready" for card in shown):
        sys.exit(NOT_WELL)  # said above: there was no room for its engine
