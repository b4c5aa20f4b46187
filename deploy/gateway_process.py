"""The gateway as a child process: its start, whether it is ready, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

from gateway.config import Config

START_S = 60.0
LAST_LINES = 8
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
        scheme = "https" if self._config.gateway.tls_certificate else "http"
        return f"{scheme}://{self._config.gateway.host}:{self._config.gateway.port}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Return when it answers and reaches every engine. Raises UpError with its last words."""
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "gateway", "--config", str(self._config_path)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        async with self._session() as session:
            while await self._unreached(session) != []:
                if not self.runs or time.monotonic() > deadline:
                    words = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
                    raise UpError("the gateway did not start; its last words:\n" + "\n".join(words))
                await asyncio.sleep(0.2)

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
        except (aiohttp.ClientError, TimeoutError, KeyError):
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
