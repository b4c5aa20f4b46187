"""``tiercel completion``: a script that lets a shell complete commands, options and file names."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHELLS = ("bash", "zsh", "fish")


def add_completion(commands: Any, parser: Callable[[], argparse.ArgumentParser]) -> None:
    """``parser`` makes the whole command line's."""
    text = "print a script that completes commands in a shell"
    hint = "bash: source <(tiercel completion bash); zsh and fish: docs/commands.md"
    command = commands.add_parser("completion", help=text, description=text, epilog=hint)
    command.add_argument("shell", choices=SHELLS)
    command.set_defaults(run=lambda options: completion(options, parser()))


def completion(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    import shtab

    for action in actions(parser):
        if action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell=options.shell))


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of a command and of the commands below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from actions(command)
