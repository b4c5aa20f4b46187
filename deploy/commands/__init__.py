"""The commands of ``tiercel``, an area per file; :mod:`deploy.cli` puts them together."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import sys
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from deploy.children import stop_signals

T = TypeVar("T")

Run = Callable[[argparse.Namespace], None]

NOT_WELL = 1
"""Exit status of a command that looked and found that something is not well."""


def say(text: str) -> None:
    """Progress and errors go to standard error; standard output is for results. Where nobody reads it any
    more, as of a terminal that was closed, what is said of is done all the same."""
    with contextlib.suppress(OSError, ValueError):
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
    print(json.dumps(_as_json(found), indent=1, allow_nan=False))


def _as_json(value: Any) -> Any:
    """What is infinite or no number is null: JSON has no such numbers, and most readers refuse them."""
    if isinstance(value, BaseModel):
        return _as_json(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {name: _as_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run_engines(work: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` for work that starts engines: SIGINT, SIGTERM and a terminal's end cancel it, so that
    they are stopped, even where a shell has set SIGINT to be ignored (a job in the background)."""

    async def cancelled_by_signals() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        for number in stop_signals():
            loop.add_signal_handler(number, lambda: task and task.cancel())
        return await work

    try:
        return asyncio.run(cancelled_by_signals())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
