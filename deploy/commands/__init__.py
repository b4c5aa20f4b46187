"""The commands of ``tiercel``, an area per file; :mod:`deploy.cli` puts them together."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

Run = Callable[[argparse.Namespace], None]


def say(text: str) -> None:
    """Progress and errors go to standard error; standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def add_command(commands: Any, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    """A command that reads the YAML file."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.add_argument("--config", type=Path, default=Path("tiercel.yaml"), help="the YAML file")
    command.set_defaults(run=run)
    return command


def run_engines(work: Coroutine[Any, Any, T]) -> T:
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
