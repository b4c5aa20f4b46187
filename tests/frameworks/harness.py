"""A gateway over scripted engines, and the process that runs a framework's recipes against it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from gateway.proxy.record import Record
from gateway.telemetry.ledger import Ledger
from tests.frameworks.environments import PLACE, Framework
from tests.frameworks.recipe import sections
from tests.frameworks.scripted import Asked, read, script_for
from tests.gateway.gateway_stack import Stack, eventually, running_gateway

SECTION_S = 300
"""For one section, first imports and slow machines included."""
_QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OTEL_SDK_DISABLED": "true",
    "DO_NOT_TRACK": "1",
    "CREWAI_DISABLE_TELEMETRY": "true",
    "CREWAI_TESTING": "true",
    "NO_COLOR": "1",
}


class Scripted:
    """The stack, and what its engines saw since a section began."""

    def __init__(self, stack: Stack, records: list[Record]) -> None:
        self.stack = stack
        self.records = records
        self._seen: dict[str, int] = {}
        self._recorded = self._aborted = 0

    @property
    def url(self) -> str:
        return self.stack.url

    def begin(self) -> None:
        """Forget what was seen."""
        self._seen = {name: len(engine.requests) for name, engine in self.stack.engines.items()}
        self._recorded = len(self.records)
        self._aborted = self._count_aborted()

    def bodies(self) -> dict[str, list[dict[str, Any]]]:
        """What clients asked, by variant."""
        found = {
            name.partition(":")[2]: engine.requests[self._seen.get(name, 0) :]
            for name, engine in self.stack.engines.items()
        }
        return {variant: bodies for variant, bodies in found.items() if bodies}

    def asked(self) -> list[Asked]:
        """The same, read; of all variants."""
        return [read(body) for bodies in self.bodies().values() for body in bodies]

    def told(self) -> list[Record]:
        """What the gateway has in its books of it."""
        return self.records[self._recorded :]

    def aborted(self) -> int:
        return self._count_aborted() - self._aborted

    def running(self) -> int:
        return sum(engine.running for engine in self.stack.engines.values())

    def _count_aborted(self) -> int:
        return sum(engine.aborted for engine in self.stack.engines.values())


@asynccontextmanager
async def scripted_stack() -> AsyncIterator[Scripted]:
    """Three variants: int4-kv8 for intent classifiers, int8 for summarizers, bf16 for the rest."""
    records: list[Record] = []
    book = Ledger.record

    def record(self: Ledger, one: Record, exchange: object = None, *, log: bool) -> None:
        records.append(one)
        book(self, one, exchange, log=log)

    Ledger.record = record  # type: ignore[method-assign]
    try:
        async with running_gateway(
            gateway={"access_log": False}, quality={"sample_rate": 0.0}, watch={"enabled": False}
        ) as stack:
            for name, engine in stack.engines.items():
                engine.scripts = partial(script_for, name.partition(":")[2])
            yield Scripted(stack, records)
    finally:
        Ledger.record = book  # type: ignore[method-assign]


class Recipes:
    """A framework's page, and the process that runs its sections."""

    def __init__(self, framework: Framework, url: str, home: Path, page: Path | None = None) -> None:
        self.framework = framework
        self.page = page or framework.page
        self.sections = sections(self.page.read_text(encoding="utf-8"))
        self._url, self._home = url, home
        self._process: asyncio.subprocess.Process | None = None
        self._ran: set[str] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Recipes]:
        python = self.framework.python
        assert python is not None
        log = self._home / f"{self.framework.name}.log"
        environment = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        if python == Path(sys.executable) and "PYTHONPATH" in os.environ:
            environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
        environment |= {**_QUIET, "HOME": str(self._home), "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as errors:
            self._process = await asyncio.create_subprocess_exec(
                str(python),
                str(Path(__file__).parent / "recipe.py"),
                str(self.page),
                self._url,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env=environment,
                cwd=self._home,
                limit=1 << 24,
            )
            try:
                yield self
            finally:
                if self._process.returncode is None:
                    self._process.kill()
                await self._process.wait()

    async def prepare(self, section: str) -> None:
        """Run what stands above a section on the page, where that has not been done: it builds on it."""
        for above in list(self.sections)[: list(self.sections).index(section)]:
            if above not in self._ran and above != "Cancel":
                await self.run(above)

    async def run(self, section: str) -> dict[str, Any]:
        """What the section left behind; it must raise nothing, and reach for nothing but the gateway."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        self._ran.add(section)
        process.stdin.write(section.encode() + b"\n")
        async with asyncio.timeout(SECTION_S):
            line = await process.stdout.readline()
        assert line, f"the process ended: {self._last_words()}"
        told: dict[str, Any] = json.loads(line)
        assert "error" not in told, told["error"] + self._last_words()
        assert not told.pop("outside"), "it reached for what is not on this machine"
        return told

    def _last_words(self) -> str:
        log = self._home / f"{self.framework.name}.log"
        return log.read_text(encoding="utf-8", errors="replace")[-4000:]


__all__ = ["PLACE", "Recipes", "Scripted", "eventually", "scripted_stack"]
