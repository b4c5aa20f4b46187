"""``tiercel watch score`` from time to time, while ``tiercel up`` runs.

In a process of its own: what it reads is what clients have written, and the reference's engine is its child.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from deploy.children import end_with_parent, own_environment
from gateway.config import Config

Say = Callable[[str], None]
STOP_MARGIN_S = 10.0
"""Beside the time that an engine has to end."""


class Scheduled:
    """Runs the command each ``every_s`` seconds. What keeps it from its work is said once, until it is
    something else."""

    def __init__(self, command: Sequence[str], every_s: float, stop_s: float, say: Say) -> None:
        self._command, self._every_s, self._stop_s, self._say = tuple(command), every_s, stop_s, say
        self._told = ""

    @classmethod
    def of(cls, config: Config, path: Path, say: Say) -> Scheduled | None:
        """None where the configuration wants no such thing."""
        watch = config.watch
        if not watch.enabled or watch.reference != "batch" or watch.waiting.every_s is None:
            return None
        command = (sys.executable, "-m", "deploy.cli", "watch", "score", "--config", str(path))
        return cls(command, watch.waiting.every_s, config.engine.stop_timeout_s + STOP_MARGIN_S, say)

    async def run(self) -> None:
        """Until cancelled; the command's process has ended then."""
        while True:
            await asyncio.sleep(self._every_s)
            await self.once()

    async def once(self) -> None:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=own_environment(),
            start_new_session=True,
            preexec_fn=end_with_parent(),
        )
        try:
            found, said = await process.communicate()
        except asyncio.CancelledError:
            await asyncio.shield(self._end(process))
            raise
        if process.returncode == 0:
            self._told = ""
            for line in found.decode(errors="replace").splitlines():
                self._say(f"watch: {line}")
            return
        why = (said.decode(errors="replace").splitlines() or [f"status {process.returncode}"])[-1]
        if why != self._told:
            self._told = why
            self._say(f"watch: what waits for the reference is not scored, and tried again: {why}")

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        for number, patience in ((signal.SIGTERM, self._stop_s), (signal.SIGKILL, STOP_MARGIN_S)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), patience)
                return
