"""The gateway as a child process: its start, whether it is ready, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import aiohttp

from deploy.children import end_with_parent, own_environment
from deploy.ports import address
from gateway.config import Config

START_S = 60.0
OTHERS_S = 10.0
"""For engines that others started to be reached: nothing waits for them any longer."""
LAST_LINES, LAST_BYTES = 8, 64 << 10
"""Of its log, what an error shows, and what is read for it."""
STOP_MARGIN_S = 5.0


class UpError(RuntimeError):
    """The stack cannot be started. The text says why and what to do."""


class GatewayProcess:
    """One gateway, which may be the parent of workers; started again when it has ended, another process."""

    def __init__(self, config: Config, config_path: Path) -> None:
        self._config, self._config_path = config, config_path
        self.log = config.run_dir / "logs" / "gateway.log"
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return address(self._config)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self, ours: Collection[str] = ()) -> list[str]:
        """Return when it answers and reaches the engines of ``ours``, each a ``model:variant``: those of
        others that it does not reach. Raises UpError with its last words."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "gateway", "--config", str(self._config_path)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=own_environment(),
                start_new_session=True,
                preexec_fn=end_with_parent(),
            )
        began = time.monotonic()
        async with self._session() as session:
            while (unreached := await self._unreached(session)) != []:
                waited = time.monotonic() - began
                missing = [variant for variant in ours if unreached is None or variant in unreached]
                if unreached is not None and not missing and waited > OTHERS_S:
                    break
                if not self.runs or waited > START_S:
                    what = "did not start" if unreached is None else f"does not reach {', '.join(missing)}"
                    raise UpError(f"the gateway {what}; its last words:\n{self._last_words()}")
                await asyncio.sleep(0.2)
        return unreached

    def _last_words(self) -> str:
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LAST_BYTES))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-LAST_LINES:])

    async def until_unreached(self, variant: str, within_s: float) -> bool:
        """Wait until the gateway knows that a ``model:variant`` takes no more requests; whether it does."""
        deadline = time.monotonic() + within_s
        async with self._session() as session:
            while variant not in (await self._unreached(session) or ()):
                if not self.runs or time.monotonic() > deadline:
                    return False
                await asyncio.sleep(0.2)
        return True

    def _session(self) -> aiohttp.ClientSession:
        # The certificate is of the name that clients use, which is not that of this machine.
        unchecked = aiohttp.TCPConnector(ssl=False)
        return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5), connector=unchecked)

    async def _unreached(self, session: aiohttp.ClientSession) -> list[str] | None:
        """Variants without a replica that can be reached; None where the gateway does not answer."""
        try:
            async with session.get(self.url + "/readiness") as response:
                found: Any = (await response.json())["not_reachable"]
                return list(found)
        except (aiohttp.ClientError, TimeoutError, KeyError, ValueError):
            return None

    async def wait(self) -> int:
        """Wait for it to end; returns its exit status."""
        if self._process is None:
            raise UpError("the gateway was never started")
        return await self._process.wait()

    async def stop(self) -> None:
        """It drains, for as long as it is configured to; then it is killed."""
        if self._process is None or not self.runs:
            return
        drained = self._config.gateway.shutdown_timeout_s + STOP_MARGIN_S
        for sent, patience in ((signal.SIGTERM, drained), (signal.SIGKILL, STOP_MARGIN_S)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, sent)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), patience)
                break
