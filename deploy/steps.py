"""Steps of a pipeline: commands of ``tiercel``, each in a process of its own, and which of them are done."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from deploy.children import end_with_parent, own_environment
from quantize.core.files import write_whole
from quantize.train.loop import TrainError

Say = Callable[[str], None]
INTERRUPTED = 130
"""Exit status of a command that a person has stopped."""


@dataclass(frozen=True)
class Step:
    """A command of ``tiercel``."""

    name: str
    arguments: tuple[str, ...]
    is_there: Callable[[], bool]
    """Whether what it makes is there."""
    asks: Callable[[], str] = lambda: ""
    """What decides its result and cannot be seen in it."""
    makes: Path | None = None
    """A directory that it writes whole or not at all, and that must not be there before."""


class Kept:
    """What is known of a pipeline, by name: a file in its directory. Raises TrainError for one that cannot be
    read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            found = {}
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise TrainError(f"{path} cannot be read; remove it, steps are looked at anew then")
        self._said: dict[str, Any] = found

    def get(self, name: str) -> Any:
        """None for what is not known."""
        return self._said.get(name)

    def put(self, name: str, value: Any) -> None:
        """Keep a value as JSON has it, on the disk for good."""
        self._said[name] = value
        write_whole(self.path, json.dumps(self._said, indent=1) + "\n")


def run_step(step: Step, kept: Kept, say: Say) -> None:
    """Run a step that is not done. Raises TrainError where it fails, KeyboardInterrupt where stopped."""
    asked = step.asks()
    if (kept.get(step.name) or "") == asked and step.is_there():
        say(f"{step.name}: done before")
        return
    if step.makes is not None:
        if step.makes.exists():
            kept.put(step.name, "")  # first: what is half removed was made of nothing
            shutil.rmtree(step.makes)
        kept.put(step.name, asked)  # first: where it is there, it was made whole
    say(f"{step.name}: tiercel {' '.join(step.arguments)}")
    status, stopped = _status([sys.executable, "-m", "deploy.cli", *step.arguments])
    if status == 0:
        kept.put(step.name, asked)
    elif status < 0 and not stopped:
        why = "; perhaps memory ran out" if status == -signal.SIGKILL else ""
        raise TrainError(
            f"{step.name} was killed by {signal.Signals(-status).name}{why}; the same command goes on with it"
        )
    if stopped or status == INTERRUPTED:
        raise KeyboardInterrupt
    if status:
        raise TrainError(f"{step.name} failed, for the reason above; the same command goes on with it")


def _status(command: Sequence[str]) -> tuple[int, bool]:
    """The exit status of a process, which ends with this one, and whether a person stopped it meanwhile.

    SIGINT and SIGTERM are passed on as SIGINT, at which a command keeps what is done; a terminal's does not
    reach it by itself.
    """
    stopped = False
    process = subprocess.Popen(
        command,
        stdout=sys.stderr,
        env=own_environment(),
        start_new_session=True,
        preexec_fn=end_with_parent(),
    )

    def pass_on(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        process.send_signal(signal.SIGINT)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait(), stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
