"""The control plane: background jobs under supervision, and reloads that change all or nothing.

A job that fails is logged with its traceback and begun anew after a back-off that doubles while it keeps
failing. A reload reads, validates and builds in a thread, one at a time, and changes nothing; what it has
built is then taken over at once, in the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from gateway.cards import Read
from gateway.config import Config
from gateway.telemetry.logs import EVENTS
from gateway.telemetry.metrics import Metrics
from quantize.card import Card

FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.1, 30.0
STEADY = 10
"""A job that ran so many times as long as its back-off ran well: the next one is the shortest again."""
STOP_S = 2.0
"""For all jobs together to end when they are cancelled."""
TICK_S = 0.1
LOOK_S = 1.0
"""An interval that a reload has changed is seen this soon."""

Job = Callable[[], Awaitable[None]]


class Supervisor:
    """Runs jobs until ``stop``. Their names are labels of metrics."""

    def __init__(self, metrics: Metrics, first_back_off_s: float = FIRST_BACK_OFF_S) -> None:
        self._metrics = metrics
        self._first_back_off_s = first_back_off_s
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._events = logging.getLogger(EVENTS)

    def keep(self, name: str, run: Job) -> None:
        """Begin a job that runs until it is cancelled."""
        self._tasks[name] = asyncio.create_task(self._keep(name, run), name=name)

    def every(self, name: str, interval_s: Callable[[], float], once: Job) -> None:
        """Begin a job that does something each ``interval_s()`` seconds, which may change meanwhile."""

        async def run() -> None:
            while True:
                began = time.monotonic()
                await once()
                while True:
                    left = began + interval_s() - time.monotonic()
                    if left <= 0:
                        break
                    await asyncio.sleep(min(left, LOOK_S))

        self.keep(name, run)

    async def _keep(self, name: str, run: Job) -> None:
        up, restarts = self._metrics.job_up.labels(name), self._metrics.job_restarts.labels(name)
        back_off = self._first_back_off_s
        while True:
            began = time.monotonic()
            up.set(1)
            try:
                await run()
                self._events.error("the background job %s ended by itself", name)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    up.set(0)
                    raise
                # Something that it waited for was cancelled, and not the job.
                self._events.exception("the background job %s was cut off", name)
            except Exception:
                self._events.exception("the background job %s failed", name)
            up.set(0)
            restarts.inc()
            if time.monotonic() - began > STEADY * back_off:
                back_off = self._first_back_off_s
            await asyncio.sleep(back_off)
            back_off = min(2 * back_off, LONGEST_BACK_OFF_S)

    async def stop(self, within_s: float = STOP_S) -> None:
        """Cancel all jobs, the one that began last first, each when the one before it has ended. What does
        not end within ``within_s`` seconds in all is left behind."""
        deadline = time.monotonic() + within_s
        while self._tasks:
            name, task = self._tasks.popitem()
            task.cancel()
            _, left = await asyncio.wait({task}, timeout=max(0.0, deadline - time.monotonic()))
            if left:
                self._events.error("the background job %s does not end", name)


class Heartbeat:
    """Measures how late the event loop wakes, and does what is due at each beat."""

    def __init__(self, metrics: Metrics, *each: Callable[[], None]) -> None:
        self._lag = metrics.loop_lag.labels()
        self._each = each

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK_S
            await asyncio.sleep(TICK_S)
            self._lag.observe(max(0.0, loop.time() - due))
            for call in self._each:
                call()


Commit = Callable[[], None]
"""Takes over what was built. It only assigns, so it does not fail."""


class Reloads:
    """Takes one configuration after another. ``build`` is called in a thread, makes what a configuration
    needs, changes nothing, and raises ConfigError for one that cannot be used. ``read`` makes a
    configuration of text."""

    def __init__(
        self,
        build: Callable[[Config, Mapping[str, Card]], Commit],
        read: Callable[[str], tuple[Config, Mapping[str, Card]]],
    ) -> None:
        self._build = build
        self._read = read
        self._one_at_a_time = asyncio.Lock()
        self._prepared: Commit | None = None

    async def apply(self, read: Read) -> None:
        """Read, build and commit. Raises ConfigError or CardError, and then nothing has changed."""
        async with self._one_at_a_time:
            commit = await asyncio.to_thread(self._built, read)
            commit()

    async def replace(self, text: str) -> None:
        """The same, of text."""
        await self.apply(lambda: self._read(text))

    async def prepare(self, text: str) -> None:
        """Read and build; ``commit`` or ``drop`` must follow. Raises ConfigError or CardError, and then
        neither must."""
        await self._one_at_a_time.acquire()
        try:
            self._prepared = await asyncio.to_thread(self._built, lambda: self._read(text))
        except BaseException:
            self._one_at_a_time.release()
            raise

    def commit(self) -> None:
        """Take over what was prepared."""
        if self._prepared is not None:
            prepared, self._prepared = self._prepared, None
            self._one_at_a_time.release()
            prepared()

    def drop(self) -> None:
        """Do not take over what was prepared."""
        if self._prepared is not None:
            self._prepared = None
            self._one_at_a_time.release()

    def _built(self, read: Read) -> Commit:
        return self._build(*read())
