"""Keeps conversations, as the event loop sees it: a sample is handed over as bytes, and nobody waits.

What is kept of a request is decided in the process that reads content, sealed and written in a thread. What
there is no room or no store for is dropped and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol, TypeVar

from gateway.config import Config, ConfigError
from gateway.kept.cipher import cipher_of
from gateway.kept.conversation import LONGEST
from gateway.kept.store import About, KeptStore, Limits, Row, limits_of, missing_store, store_url
from gateway.quality.records import AnswerRecord, Keep, Kept, Step, Task, Unfit, encode
from gateway.quality.sampling import SHARE, is_in
from gateway.store.database import StoreError
from gateway.telemetry.logs import EVENTS
from gateway.telemetry.metrics import Metrics

LIMIT_S = 20.0
"""Seconds that the process may take over one, with many patterns of the user's own."""
MOST_WAITING = 256
MOST_WAITING_BYTES = 16 << 20
"""What waits to be written."""
PRUNE_S = 600.0
AGAIN_S = 5.0
"""After a store that failed."""

T = TypeVar("T")


class Reader(Protocol):
    """The process that reads content."""

    def submit(
        self,
        task: Task,
        record: bytes,
        done: Callable[[Step | None], None],
        limit_s: float,
        *,
        counted: bool,
    ) -> object | None: ...


class Keeper:
    """Of one gateway process."""

    def __init__(
        self, config: Config, metrics: Metrics, reader: Reader, clock: Callable[[], float] = time.time
    ) -> None:
        """``clock``: Unix time. The store is opened when it is first needed."""
        self._metrics = metrics
        self._reader = reader
        self._clock = clock
        self._events = logging.getLogger(EVENTS)
        self._thread = ThreadPoolExecutor(1, "kept")
        self._store: KeptStore | None = None
        self._waiting: list[Row] = []
        self._waiting_bytes = 0
        self._more = asyncio.Event()
        self._failing = False
        self.know(config)

    def know(self, config: Config) -> None:
        """The configuration in use. The store stays what it was when it was opened."""
        self._config = config
        self._limits: Limits | None = limits_of(config) if config.kept is not None else None
        self._shares = {
            name: int(role.record.rate * SHARE)
            for name, role in config.roles.items()
            if role.record is not None and config.kept is not None
        }

    @property
    def own(self) -> list[str]:
        """The user's patterns."""
        return list(self._config.kept.redact) if self._config.kept is not None else []

    def offer(self, role: str, variant: str, sample_id: str, body: bytes, *, chat: bool) -> None:
        """A request that was answered. Never waits, and raises nothing."""
        if not is_in(sample_id, "keep", self._shares.get(role, 0)):
            return
        about = About("request", role, variant, "", self._clock())
        try:
            self._offer(about, body, chat)
        except Exception:
            self._count(about, "error")
            self._events.exception("a request could not be kept")

    def _offer(self, about: About, body: bytes, chat: bool) -> None:
        if not chat:
            self._count(about, Unfit.FORM)
        elif len(body) > LONGEST:
            self._count(about, Unfit.TOO_LONG)
        else:
            self._read(about, encode(AnswerRecord(body, [])))

    def offer_answer(self, role: str, variant: str, version: str, record: bytes) -> None:
        """An answer, as an encoded ``AnswerRecord``, that the reference is to score."""
        if self._limits is not None:
            self._read(About("answer", role, variant, version, self._clock()), record)

    def take(self, about: About, step: Step | None) -> None:
        """What the process says is to be kept."""
        found = step.findings if step is not None else None
        if found is None:
            self._count(about, "error")
        elif found.kept is not None:
            self.put(about, found.kept)
        else:
            self._count(about, found.unfit or "error")

    def put(self, about: About, kept: Kept) -> None:
        """Have it written."""
        data = kept.data
        if len(self._waiting) >= MOST_WAITING or self._waiting_bytes + len(data) > MOST_WAITING_BYTES:
            self._count(about, "full")
            return
        self._waiting.append(Row(about, data))
        self._waiting_bytes += len(data)
        self._more.set()

    def about(self, role: str, variant: str, version: str, *, probation: bool) -> About:
        """Of an answer that was given now."""
        return About("answer", role, variant, version, self._clock(), probation)

    async def run(self) -> None:
        """Until cancelled; then what waits is written. It may be run again after a failure."""
        pruned = time.monotonic() - PRUNE_S
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PRUNE_S):
                        await self._more.wait()
                await self._write(time.monotonic() - pruned >= PRUNE_S)
                if time.monotonic() - pruned >= PRUNE_S:
                    pruned = time.monotonic()
                if self._failing:
                    await asyncio.sleep(AGAIN_S)
        except asyncio.CancelledError:
            await asyncio.shield(self._last())
            raise

    async def _last(self) -> None:
        with contextlib.suppress(Exception):
            await self._write(prune=False)
        if self._store is not None:
            await self._in_thread(self._store.close)
            self._store = None
        self._thread.shutdown(wait=False)

    async def _write(self, prune: bool) -> None:
        self._more.clear()
        limits, rows = self._limits, self._waiting
        self._waiting, self._waiting_bytes = [], 0
        if limits is None or not (rows or prune):
            return
        try:
            written = await self._in_thread(partial(self._write_now, rows, limits))
        except (StoreError, ConfigError, OSError) as error:
            for row in rows:
                self._count(row.about, "store_down")
            if not self._failing:
                self._events.error("nothing can be kept now; it is tried again: %s", error)
            self._failing = True
            return
        self._failing = False
        for row, new in zip(rows, written, strict=True):
            self._count(row.about, "kept" if new else "known")

    def _write_now(self, rows: Sequence[Row], limits: Limits) -> list[bool]:
        if self._store is None:
            if not rows and missing_store(self._config) is not None:
                return []  # there is nothing to be forgotten
            self._config.run_dir.mkdir(parents=True, exist_ok=True)
            self._store = KeptStore(store_url(self._config), cipher_of(self._config, make=bool(rows)))
        return self._store.keep(rows, limits, self._clock())

    def _read(self, about: About, record: bytes) -> None:
        task = Keep(about.kind, self.own)
        if self._reader.submit(task, record, partial(self.take, about), LIMIT_S, counted=False) is None:
            self._count(about, "full")

    def _count(self, about: About, outcome: str) -> None:
        self._metrics.kept.labels(self._metrics.role(about.role), about.kind, str(outcome)).inc()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
