"""The command line. Errors that a person can mend are one sentence on standard error and status 2."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Coroutine, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from deploy.engine import EngineStartError
from deploy.supervisor import UpError, run_until_stopped
from gateway.config import ConfigError, load_config
from quantize.calibration import CalibrationError
from quantize.card import CardError
from quantize.checkpoint import CheckpointError, open_checkpoint
from quantize.compress import QuantizeError
from quantize.evaluate.bench import BenchError
from quantize.evaluate.client import EngineError
from quantize.evaluate.tasks import TaskError
from quantize.methods import MethodError
from quantize.planner import PlanError
from quantize.recipes import RECIPES
from quantize.registry import Registry
from quantize.schemes import SchemeError
from quantize.target import TargetError

T = TypeVar("T")

USER_ERRORS = (
    ConfigError,
    CardError,
    CheckpointError,
    CalibrationError,
    QuantizeError,
    MethodError,
    PlanError,
    SchemeError,
    TargetError,
    BenchError,
    TaskError,
    EngineStartError,
    EngineError,
    UpError,
)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def quantize(options: argparse.Namespace) -> None:
    from deploy.making import evaluate_variants, format_cards, make_variants

    config = load_config(options.config)
    cards = make_variants(config, options.variants or list(RECIPES), say)
    if options.evaluate:
        cards = _run(evaluate_variants(config, cards, say))
    print(format_cards(cards))


def quantize_sensitivity(options: argparse.Namespace) -> None:
    from deploy.planning import format_sensitivity, sensitivity

    found, path = sensitivity(load_config(options.config), options.target)
    print(found.model_dump_json(indent=1) if options.json else format_sensitivity(found))
    say(f"written to {path}")


def quantize_plan(options: argparse.Namespace) -> None:
    from deploy.making import evaluate_variants, format_cards
    from deploy.planning import plan
    from quantize.methods import parse_method

    config = load_config(options.config)
    for method in options.methods:
        parse_method(method)
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
    )
    cards = [card]
    if options.evaluate:
        registry = Registry(config.variants_dir, config.model.name, config.reference)
        reference = registry.add_reference(open_checkpoint(config.model.path))
        cards = _run(evaluate_variants(config, [reference, card], say))
    print(format_cards(cards))


def variants(options: argparse.Namespace) -> None:
    from deploy.making import format_cards

    config = load_config(options.config)
    registry = Registry(config.variants_dir, config.model.name, config.reference)
    names = [name for name in (config.reference, *RECIPES) if registry.path(name).is_dir()]
    if not names:
        raise CardError(f"{config.variants_dir} holds no variants; make them with `tiercel quantize`")
    cards = [registry.card(name) for name in names]
    print(format_cards(cards))
    for card in cards:
        for role, verdict in card.gate.items():
            print(f"{card.variant} for {role}: {verdict.outcome}: " + "; ".join(verdict.reasons))


def up(options: argparse.Namespace) -> None:
    asyncio.run(run_until_stopped(load_config(options.config), options.config, say))


def demo(options: argparse.Namespace) -> None:
    from deploy.demo import run_demo
    from deploy.making import make_variants

    config = load_config(options.config)
    say("1/4 quantize: making the variants")
    cards = make_variants(config, config.serve, say)
    _run(run_demo(config, options.config, cards, options.out, options.messages, say))


def _run(work: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` for work that starts engines: SIGINT and SIGTERM cancel it, so that they are
    stopped, even where a shell has set SIGINT to be ignored (a job in the background)."""

    async def cancelled_by_signals() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, lambda: task and task.cancel())
        return await work

    try:
        return asyncio.run(cancelled_by_signals())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="tiercel", description="Serves every agent at the precision it needs.")
    top.add_argument("--version", action="version", version=f"tiercel {version('tiercel')}")
    commands = top.add_subparsers(required=True, metavar="command")

    def add(name: str, run: object, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", type=Path, default=Path("tiercel.yaml"), help="the YAML file")
        command.set_defaults(run=run)
        return command

    text = "make variants, measure them on their engines, judge them per role; plan mixtures of precisions"
    _quantize_commands(commands.add_parser("quantize", help=text, description=text))
    add("variants", variants, "list the variants with their figures and verdicts")
    add("up", up, "start one engine per served variant and the gateway, until Ctrl-C")
    showing = add("demo", demo, "quantize, serve, and run the demo team; writes a report")
    showing.add_argument("--out", type=Path, default=Path("var/demo"), help="where the report goes")
    showing.add_argument("--messages", type=int, default=200, help="customer messages to send")
    return top


QUANTIZE_COMMANDS = ("make", "sensitivity", "plan", "-h", "--help")


def _with_make(arguments: Sequence[str]) -> list[str]:
    """``tiercel quantize int8`` is short for ``tiercel quantize make int8``."""
    given = list(arguments)
    if given[:1] == ["quantize"] and (len(given) == 1 or given[1] not in QUANTIZE_COMMANDS):
        given.insert(1, "make")
    return given


def _quantize_commands(quantizing: argparse.ArgumentParser) -> None:
    """The commands of ``tiercel quantize``; ``make`` is the one when none is named."""
    commands = quantizing.add_subparsers(required=True, metavar="command")

    def add(name: str, run: object, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", type=Path, default=Path("tiercel.yaml"), help="the YAML file")
        command.set_defaults(run=run)
        return command

    def unmeasured(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--no-evaluate", dest="evaluate", action="store_false", help="only make it, without a gate"
        )

    making = add("make", quantize, "make named variants, measure and judge them")
    making.add_argument("variants", nargs="*", help=f"which (default: {' '.join(RECIPES)})")
    unmeasured(making)
    looking = add("sensitivity", quantize_sensitivity, "what each module group loses at each scheme")
    looking.add_argument("--target", help="where it is to be loaded (default: this machine's processor)")
    looking.add_argument("--json", action="store_true", help="machine-readable")
    planning = add("plan", quantize_plan, "find and make the best mixture of schemes within a budget")
    wanted = planning.add_mutually_exclusive_group()
    wanted.add_argument("--bits", type=float, help="bits per weight, scales included (default: 4.5)")
    wanted.add_argument("--bytes", type=int, help="bytes of all weights, and of the KV cache if asked for")
    wanted.add_argument("--loss", type=float, help="the fewest bytes with at most this mean KL, nats a token")
    planning.add_argument("--name", default="planned", help="the variant's name (default: planned)")
    planning.add_argument("--target", help="where it is to be loaded (default: this machine's processor)")
    planning.add_argument("--kv", nargs="+", default=["auto"], help="KV-cache schemes to choose from")
    planning.add_argument("--concurrency", type=int, default=0, help="requests whose cache counts in --bytes")
    planning.add_argument("--context", type=int, default=0, help="tokens of each of those")
    planning.add_argument("--tries", type=int, default=200, help="measured changes of the plan")
    planning.add_argument(
        "--methods", nargs="+", default=["gptq", "imatrix+gptq"], help="whose parts may be mixed"
    )
    unmeasured(planning)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(_with_make(sys.argv[1:] if arguments is None else arguments))
    try:
        options.run(options)
    except KeyboardInterrupt:
        say("tiercel: interrupted; what was finished is kept")
        sys.exit(130)
    except USER_ERRORS as error:
        say(f"tiercel: {error}")
        sys.exit(2)
    except BaseExceptionGroup as group:  # the first failure of several engines at once
        known, unknown = group.split(USER_ERRORS)
        if known is None or unknown is not None:
            raise
        say(f"tiercel: {_first(known)}")
        sys.exit(2)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first exception of a group that is not a group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    main()
