"""Several processes that share the gateway's port (``SO_REUSEPORT``), and what they have to agree on.

Each worker is a whole gateway. A board in shared memory has every worker's requests in flight at every
replica, so that limits and the choice of a replica count all of them. Metrics are added up when they are
asked for: the worker that is asked collects the others' numbers over sockets in the run directory. Each
worker keeps its own view of which replicas fail, and of what is in their caches.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric

from gateway.config import Config
from gateway.telemetry.counters import Family
from gateway.telemetry.metrics import Metrics

SLOTS = 1 << 14
"""Replicas that the board has room for; a replica's place follows from its name and address."""
_ASK_S = 2.0
_STEADY_S = 30.0
_FIRST_BACK_OFF_S, _LONGEST_BACK_OFF_S = 0.5, 30.0


class Board:
    """Requests in flight: a row per worker, a column per replica. Each worker writes its own row alone."""

    def __init__(self, path: Path, worker: int, workers: int) -> None:
        size = 4 * SLOTS * workers
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, size)
            self._map = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        self._cells = memoryview(self._map).cast("i")
        self._mine = SLOTS * worker
        self._others = [SLOTS * other for other in range(workers) if other != worker]
        self._cells[self._mine : self._mine + SLOTS] = memoryview(bytes(4 * SLOTS)).cast("i")

    @staticmethod
    def slot(variant: str, url: str) -> int:
        return zlib.crc32(f"{variant}\0{url}".encode()) % SLOTS

    def write(self, slot: int, in_flight: int) -> None:
        self._cells[self._mine + slot] = in_flight

    def others(self, slot: int) -> int:
        """Requests of all other workers."""
        return sum(self._cells[row + slot] for row in self._others)

    def close(self) -> None:
        self._cells.release()
        self._map.close()


class Siblings:
    """A worker's way to the others' numbers, and theirs to its own."""

    def __init__(self, directory: Path, worker: int, workers: int, metrics: Metrics) -> None:
        self._directory = directory
        self._worker = worker
        self._others = [number for number in range(workers) if number != worker]
        self._metrics = metrics

    @contextlib.asynccontextmanager
    async def listening(self) -> Any:
        """Answer the others for as long as the block lasts."""
        path = self._socket(self._worker)
        path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._answer, path)
        try:
            yield
        finally:
            server.close()
            path.unlink(missing_ok=True)

    async def text(self) -> bytes:
        """The metrics of all workers together, as Prometheus text. One that does not answer is left out."""
        view: Any = _Sum(self._metrics, [dump for dump in await self.dumps() if dump is not None])
        return generate_latest(view)

    async def dumps(self) -> list[dict[str, Any] | None]:
        """What ``Metrics.dump`` gives of each of the others; None of one that does not answer."""
        return await asyncio.gather(*(self._ask(number) for number in self._others))

    def _socket(self, worker: int) -> Path:
        return self._directory / f"worker-{worker}.sock"

    async def _answer(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(json.dumps(self._metrics.dump()).encode())
            await writer.drain()
        writer.close()

    async def _ask(self, worker: int) -> dict[str, Any] | None:
        try:
            async with asyncio.timeout(_ASK_S):
                reader, writer = await asyncio.open_unix_connection(self._socket(worker))
                try:
                    return dict(json.loads(await reader.read()))
                finally:
                    writer.close()
        except (OSError, ValueError):
            return None


class _Sum:
    """A registry's metrics with other workers' numbers added."""

    def __init__(self, metrics: Metrics, dumps: Sequence[dict[str, Any]]) -> None:
        self._metrics = metrics
        self._dumps = dumps

    def collect(self) -> Iterable[Metric]:
        total = Metrics(CollectorRegistry(), ())
        for dump in (self._metrics.dump(), *self._dumps):
            for name, numbers in dump.items():
                family: Family[Any] | None = total.families.get(name)
                if family is not None:
                    family.add((tuple(labels), values) for labels, values in numbers)
        ours = {name.removesuffix("_total") for name in total.families}
        for metric in self._metrics.registry.collect():
            if metric.name not in ours:
                yield metric
        for family in total.families.values():
            yield from family.collect()


def run_workers(config: Config, path: Path) -> int:
    """Keep the configured number of workers running until SIGTERM or SIGINT. The exit status is 0, or that
    of a worker that could not start at all."""
    directory = config.run_dir / "workers"
    directory.mkdir(parents=True, exist_ok=True)
    parent = _Parent([sys.executable, "-m", "gateway", "--config", str(path)], config.gateway.workers)
    return parent.run(config.gateway.shutdown_timeout_s + 5)


class _Parent:
    def __init__(self, command: list[str], workers: int) -> None:
        self._command = command
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * workers
        self._started = [0.0] * workers
        self._back_off = [_FIRST_BACK_OFF_S] * workers
        self._stopping = False

    def run(self, patience_s: float) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGHUP, lambda *_: self._tell(signal.SIGHUP))
        for worker in range(len(self._processes)):
            self._start(worker)
        status = 0
        while not self._stopping:
            time.sleep(0.1)
            for worker, process in enumerate(self._processes):
                if process is not None and process.poll() is not None and not self._stopping:
                    if process.returncode == 2 and time.monotonic() - self._started[worker] < _STEADY_S:
                        status = 2  # it has said why it cannot start
                        self._stopping = True
                        break
                    self._again(worker)
        self._tell(signal.SIGTERM)
        deadline = time.monotonic() + patience_s
        for process in self._processes:
            if process is not None:
                try:
                    process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        return status

    def _start(self, worker: int) -> None:
        self._started[worker] = time.monotonic()
        self._processes[worker] = subprocess.Popen([*self._command, "--worker", str(worker)])

    def _again(self, worker: int) -> None:
        """Start a worker that has ended, later and later if it keeps ending."""
        if time.monotonic() - self._started[worker] > _STEADY_S:
            self._back_off[worker] = _FIRST_BACK_OFF_S
        time.sleep(self._back_off[worker])
        self._back_off[worker] = min(2 * self._back_off[worker], _LONGEST_BACK_OFF_S)
        self._start(worker)

    def _tell(self, number: int) -> None:
        for process in self._processes:
            if process is not None and process.poll() is None:
                process.send_signal(number)

    def _stop(self, *_: object) -> None:
        self._stopping = True
