"""The command line. Errors that a person can mend are one sentence on standard error and status 2; what is
found to be unwell is status 1 (docs/commands.md). See :mod:`deploy.commands.errors` for all others."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from deploy.commands import add_command, run_engines, say
from deploy.commands.advise import add_advise
from deploy.commands.completion import add_completion
from deploy.commands.doctor import add_doctor
from deploy.commands.errors import explain
from deploy.commands.export import add_export
from deploy.commands.fleet import add_fleet, with_placement
from deploy.commands.gateway import add_gateway
from deploy.commands.init import add_init, add_up
from deploy.commands.quantize import add_quantize, with_make
from deploy.commands.status import add_status
from deploy.commands.tasks import add_tasks, with_tasks
from deploy.commands.top import add_top
from deploy.commands.train import add_train
from deploy.commands.variants import add_variants, with_list
from deploy.commands.watch import add_watch, with_show
from deploy.models import one_model
from gateway.config import load_config


def demo(options: argparse.Namespace) -> None:
    from deploy.demo import run_demo, with_what_was_made
    from deploy.making import make_variants

    config = load_config(options.config)
    say("1/5 quantize: making the variants")
    model = one_model(config)
    cards = make_variants(model, model.serve, say)
    config, path = with_what_was_made(config, options.config, cards, say)
    run_engines(run_demo(config, path, cards, options.out, options.messages, say))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="tiercel", description="Serves every agent at the precision it needs.")
    top.add_argument("--version", action="version", version=f"tiercel {version('tiercel')}")
    commands = top.add_subparsers(required=True, metavar="command")

    text = "make variants, measure them on their engines, judge them per role; plan mixtures of precisions"
    add_quantize(commands.add_parser("quantize", help=text, description=text))
    text = "train adapters or all weights for a role, merge them, and take the result to its gate"
    add_train(commands.add_parser("train", help=text, description=text))
    text = "models in the formats of other engines: GGUF for llama.cpp, ONNX for encoders"
    add_export(commands.add_parser("export", help=text, description=text))
    text = "list, show, compare, choose, delete and report what was made"
    add_variants(commands.add_parser("variants", help=text, description=text))
    add_advise(commands)
    add_gateway(commands)
    text = "do the quantized agents still tell the truth? what is known, and a person's word"
    add_watch(commands.add_parser("watch", help=text, description=text))
    add_tasks(commands)
    add_status(commands)
    add_top(commands)
    add_doctor(commands)
    add_fleet(commands)
    add_init(commands)
    add_up(commands)
    showing = add_command(commands, "demo", demo, "quantize, serve, and run the demo team; writes a report")
    showing.add_argument("--out", type=Path, default=Path("var/demo"), help="where the report goes")
    showing.add_argument("--messages", type=int, default=200, help="customer messages to send")
    add_completion(commands, parser)
    return top


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """What is typed after ``tiercel``, short forms in full."""
    given = list(arguments)
    for in_full in (with_make, with_list, with_show, with_placement, with_tasks):
        given = in_full(given)
    return parser().parse_args(given)


def main(arguments: Sequence[str] | None = None) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of another character set gets what it can show
            stream.reconfigure(errors="backslashreplace")
    options = parsed(sys.argv[1:] if arguments is None else arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        say("tiercel: interrupted; what was finished is kept")
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (Exception, BaseExceptionGroup) as error:
        text, status = explain(error, options)
        say(f"tiercel: {text}")
        sys.exit(status)


if __name__ == "__main__":
    main()
