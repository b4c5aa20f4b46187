"""``tiercel init`` and ``tiercel up``: from a checkpoint alone to a file, and to a running gateway."""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from deploy.children import own_environment
from deploy.commands import add_command, file_to_write, say
from deploy.gateway_process import UpError
from deploy.supervisor import run_until_stopped
from gateway.config import load_config

MODEL_HELP = "a checkpoint directory, or a hub's OWNER/NAME"


def add_init(commands: Any) -> None:
    text = "write a configuration for a model: what this machine can make of it, and roles to begin with"
    command = commands.add_parser("init", help=text, description=text)
    command.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    command.add_argument(
        "--out", type=file_to_write, default=Path("tiercel.yaml"), help="the YAML file to write"
    )
    command.set_defaults(run=init)


def add_up(commands: Any) -> None:
    text = "start an engine per variant and the gateway, until Ctrl-C; a MODEL is made and judged before"
    command = add_command(commands, "up", up, text)
    text = f"{MODEL_HELP}; without it, what the file says is started"
    command.add_argument("model", metavar="MODEL", nargs="?", help=text)


def init(options: argparse.Namespace) -> None:
    from deploy.starting import arrive, room_note
    from quantize.core.files import write_whole

    if not options.out.absolute().parent.is_dir():
        raise UpError(f"--out {options.out}: its directory is not there; make it first")
    if options.out.exists():
        raise UpError(f"{options.out} is there already; remove it, or name another file with --out")
    arrived = arrive(options.model, options.out.absolute().parent, say)
    for name, why in arrived.starter.left_out.items():
        say(f"{name} is left out: {why}")
    write_whole(options.out, arrived.starter.text())
    if note := room_note(arrived, options.out):
        say(note)
    again = ["tiercel", "up", options.model, "--config", str(options.out)]
    say(f"wrote {options.out}; `{shlex.join(again)}` makes, judges and serves what it says")


def up(options: argparse.Namespace) -> None:
    if options.model is not None:
        from deploy.starting import bring_up

        bring_up(options.model, options.config, say)
        # Serving needs nothing of what looking and measuring have loaded: the process begins anew.
        again = [sys.executable, "-m", "deploy.cli", "up", "--config", str(options.config)]
        os.execve(sys.executable, again, own_environment())
    asyncio.run(run_until_stopped(load_config(options.config), options.config, say))
