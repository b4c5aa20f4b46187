"""``tiercel quantize``: check, make, sensitivity, plan, register."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from deploy.commands import NOT_WELL, add_command, add_json, print_json, run_engines, say
from deploy.commands.before import refuse_unmeasurable
from deploy.commands.variants import card_as_json
from gateway.config import Config, load_config
from quantize.card import Card
from quantize.core.checkpoint import open_checkpoint
from quantize.core.methods import parse_method
from quantize.core.modules import read_modules
from quantize.core.plan import Plan
from quantize.core.recipes import RECIPES, usual_method
from quantize.core.schemes import kv_scheme, scheme
from quantize.core.targets import detect, target
from quantize.plan.controls import KINDS
from quantize.registry import Registry

COMMANDS = ("check", "make", "measure", "sensitivity", "plan", "register", "-h", "--help")
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
        "--calibration", type=Path, help="JSON Lines of conversations, for the estimate of time"
    )
    add_json(checking)
    checking.set_defaults(run=check)

    making = add_command(commands, "make", make, "make variants, measure and judge them")
    making.add_argument("variants", nargs="*", help=f"which (default: {' '.join(RECIPES)})")
    making.add_argument("--scheme", help="make one variant of this scheme instead, such as w4a16-g64")
    making.add_argument("--method", help="how, with --scheme (default: what loses least at that scheme)")
    making.add_argument("--kv", default="auto", help="KV-cache scheme, with --scheme")
    making.add_argument("--name", help="the variant's name, with --scheme")
    making.add_argument("--target", help=TARGET_HELP)
    _unmeasured(making)

    text = "measure and judge variants that are there, on the engine at hand"
    measuring = add_command(commands, "measure", measure, text)
    measuring.add_argument("variants", nargs="*", help="which (default: all)")
    add_json(measuring)
    measuring.set_defaults(evaluate=True)

    looking = add_command(commands, "sensitivity", sensitivity, "what each group loses at each scheme")
    looking.add_argument("--target", help=TARGET_HELP)
    add_json(looking)

    planning = add_command(commands, "plan", plan, "find and make the best mixture within a budget")
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
    _unmeasured(planning)

    registering = add_command(
        commands, "register", register, "take in a checkpoint that was quantized elsewhere, and gate it"
    )
    registering.add_argument("directory", type=Path, help="compressed-tensors, AWQ, GPTQ or AutoRound format")
    registering.add_argument("name", help="the variant's name")
    _unmeasured(registering)


def _unmeasured(command: argparse.ArgumentParser) -> None:
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


def check(options: argparse.Namespace) -> None:
    from quantize.check import check_report, format_check
    from quantize.make.calibration import read_calibration

    checkpoint, lengths = open_checkpoint(options.model), None
    if options.calibration:
        sequences = read_calibration(options.calibration, checkpoint).sequences
        lengths = [len(sequence) for sequence in sequences]
    report = check_report(
        checkpoint,
        target(options.target or detect()),
        tensor_parallel=options.tensor_parallel,
        calibration=lengths,
    )
    if options.json:
        print_json(report)
    else:
        print(format_check(report))


def make(options: argparse.Namespace) -> None:
    from deploy.making import make_one, make_variants

    config = load_config(options.config)
    before = _before(config, options, 1 if options.scheme else len(options.variants or RECIPES))
    if options.scheme:
        scheme(options.scheme)
        kv_scheme(options.kv)
        method = options.method or usual_method(options.scheme, config.calibration is not None)
        parse_method(method)
        name, kv = options.name, options.kv
        cards = make_one(config, name, options.scheme, method, kv, say, options.target, before)
    else:
        cards = make_variants(config, options.variants or list(RECIPES), say, options.target, before)
    _judge(config, cards, options)


def measure(options: argparse.Namespace) -> None:
    from deploy.measuring import say_hopeless

    config = load_config(options.config)
    registry = Registry(config.variants_dir, config.model.name, config.reference, say)
    names = options.variants or registry.variants()
    others = [name for name in dict.fromkeys(names) if name != config.reference]
    cards = [registry.to_measure(name) for name in (config.reference, *others)]
    say_hopeless(config, len(others), say)
    _judge(config, cards, options)


def sensitivity(options: argparse.Namespace) -> None:
    from deploy.planning import format_sensitivity, sensitivity

    found, path = sensitivity(load_config(options.config), options.target)
    if options.json:
        print_json(found)
    else:
        print(format_sensitivity(found))
    say(f"written to {path}")


def plan(options: argparse.Namespace) -> None:
    from deploy.planning import plan

    config = load_config(options.config)
    for method in options.methods or ():
        parse_method(method)
    for name in options.schemes or ():
        scheme(name)
    card, _ = plan(
        config,
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
        before=_before(config, options),
    )
    _judge(config, [_reference(config), card], options)


def register(options: argparse.Namespace) -> None:
    from quantize.check import refuse_pattern, refuse_unfit

    config = load_config(options.config)
    _before(config, options)()
    checkpoint = open_checkpoint(config.model.path)
    refuse_pattern(config.variants_dir)
    refuse_unfit(checkpoint)
    for note in checkpoint.notes:
        say(note)
    reference = _reference(config)
    registry = Registry(config.variants_dir, config.model.name, config.reference, say)
    card = registry.register(options.directory, options.name, checkpoint, target(detect()))
    if card.schemes:
        found = target(detect()).check_plan(
            Plan(groups=card.schemes, kv=card.kv), read_modules(checkpoint), checkpoint.head_dim
        )
        for problem in found:
            say(f"{options.name} may not load here: {problem}")
    _judge(config, [reference, card], options)


def _before(config: Config, options: argparse.Namespace, variants: int = 1) -> Callable[[], None]:
    """What is looked at before work, for so many variants that are to be measured."""

    def look() -> None:
        from deploy.measuring import say_hopeless

        refuse_unmeasurable(config)
        say_hopeless(config, variants, say)

    return look if options.evaluate else lambda: None


def _reference(config: Config) -> Card:
    registry = Registry(config.variants_dir, config.model.name, config.reference, say)
    return registry.add_reference(open_checkpoint(config.model.path))


def _judge(config: Config, cards: Sequence[Card], options: argparse.Namespace) -> None:
    from quantize.report.tables import format_variants

    if options.evaluate:
        from deploy.measuring import evaluate_variants

        cards = run_engines(evaluate_variants(config, cards, say))
    if options.json:
        print_json([card_as_json(card) for card in cards])
    else:
        print(format_variants(cards))
    if options.evaluate and any(card.evaluation is None and card.state == "ready" for card in cards):
        sys.exit(NOT_WELL)  # said above: there was no room for its engine
