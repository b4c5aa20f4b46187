"""The commands of ``tiercel``, an area per file; :mod:`deploy.cli` puts them together."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

Run = Callable[[argparse.Namespace], None]

NOT_WELL = 1
"""Exit status of a command that looked and found that something is not well."""


def say(text: str) -> None:
    """Progress and errors go to standard error; standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def add_command(commands: Any, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    """A command that reads the YAML file."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.add_argument("--config", type=Path, default=Path("tiercel.yaml"), help="the YAML file")
    command.set_defaults(run=run)
    return command


def add_model(command: argparse.ArgumentParser, otherwise: str = "the only one") -> None:
    """Let a command be told which model it concerns; ``otherwise`` says which without."""
    command.add_argument("--model", help=f"which model (default: {otherwise})")


def add_json(command: argparse.ArgumentParser) -> None:
    """Let a command give its result as JSON as well."""
    command.add_argument("--json", action="store_true", help="machine-readable")


def file_to_write(text: str) -> Path:
    """An ``--out`` that is a file. For argparse."""
    if not text.strip() or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory; name a file")
    return Path(text)


def print_json(found: Any) -> None:
    """One document on standard output, and nothing else there. Pydantic models are shown by their fields."""

    def shown(value: Any) -> Any:
        return value.model_dump(mode="json")

    print(json.dumps(found, indent=1, default=shown))


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
