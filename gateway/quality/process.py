"""The gateway's end of a process that reads content (:mod:`gateway.quality.worker`).

A bounded queue; one message at a time goes to the process, and a step comes back. A message that takes longer
than its bound ends the process. Whatever happens to the process, what waits in the queue is given to the next
one, which is started after a while, later and later if they keep ending; the event loop never waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

import gateway
from gateway.quality.records import HEADER, Prepare, Step, Task, decode_step, encode
from gateway.quality.schemas import NONE, Deadly, Mark
from gateway.telemetry.logs import EVENTS
from gateway.telemetry.metrics import Metrics

STEP_S = 5.0
"""Seconds that a message may take."""
CLASSIFIER_STEP_S = 60.0
"""The same where a classifier reads the answer."""
START_S = 60.0
LOAD_S = 300.0
"""Seconds until a process must have started, and have loaded its classifier."""
NICENESS = 10
"""It gets a tenth of a core that the gateway is busy on."""
MOST_WAITING = 256
MOST_WAITING_BYTES = 32 << 20
FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.25, 30.0
STEADY_S = 60.0
"""A process that has lived so long is started again at once."""
STOP_S = 1.0
"""Seconds that a process has to end by itself once its connection is closed."""
_SEND_BUFFER = 1 << 20
"""Bytes that are handed to the kernel at once."""
_COMMAND = "import sys; sys.path.insert(0, sys.argv.pop(1)); from gateway.quality.worker import main; main()"
_HOUSE = str(Path(gateway.__file__).parents[1])

T = TypeVar("T")


class LostError(RuntimeError):
    """The process ended before it answered, or could not take the message."""


@dataclass(slots=True, eq=False)
class _Job:
    task: bytes
    record: bytes
    done: Callable[[Step | None], None]
    """Called with None where there will be no step."""
    limit_s: float
    classifier: str | None
    counted: bool = False
    """It is counted as dropped where it cannot be done, and ``done`` is not called then."""
    cancelled: bool = False

    @property
    def size(self) -> int:
        return len(self.task) + len(self.record)


class CheckProcess:
    """One such process, whenever there is something for it to do, while ``run`` runs."""

    def __init__(self, name: str, metrics: Metrics, niceness: int = NICENESS) -> None:
        """``name``: for the log and the metrics."""
        self.name = name
        self._metrics = metrics
        self._niceness = niceness
        self._log = logging.getLogger(EVENTS)
        self._queue: deque[_Job] = deque()
        self._bytes = 0
        self._current: _Job | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._wanted = asyncio.Event()
        self._ready = asyncio.Event()
        self._quiet = asyncio.Event()
        """It has nothing to do."""
        self._quiet.set()
        self._closed = False
        """It takes nothing more: its gateway ends."""
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: _Connection | None = None
        self._classifier: str | None = None
        """That of the present process, or of the next one while there is none."""
        self._why = ""
        """Why the present process was ended."""
        self._begun: Mark | None = None
        """The schema that it looked at last, for the present message."""
        self.deadly = Deadly()
        self._replaced = False
        """It was ended for one with another classifier."""

    # what is asked of it

    @property
    def idle(self) -> bool:
        return self._current is None and not self._queue

    async def drain(self, within_s: float) -> None:
        """Before ``run`` is cancelled for good: what there is to do has so many seconds. What is not done by
        then is dropped, as is whatever comes later."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._quiet.wait()
        self._closed = True
        left = [job for job in (self._taken(), *self._queue) if job is not None and not job.cancelled]
        self._queue.clear()
        self._bytes = 0
        self._quiet.set()
        for job in left:
            if job.counted:
                self.drop("stopping")
            else:
                self._finish(job, None)

    @property
    def pid(self) -> int | None:
        """Of the present process."""
        return self._process.pid if self._process else None

    def want(self) -> None:
        """Start a process although there is nothing to do for it yet."""
        self._wanted.set()

    async def ready(self) -> None:
        """Wait until a process is."""
        await self._ready.wait()

    def submit(
        self,
        task: Task,
        record: bytes,
        done: Callable[[Step | None], None],
        limit_s: float = STEP_S,
        classifier: str | None = None,
        *,
        counted: bool = True,
    ) -> _Job | None:
        """Have a task done about an encoded ``AnswerRecord``; ``done`` is called with its step, or with None
        where the process was lost. None where the queue is full, or the gateway ends: that is counted as
        dropped unless its caller counts it, and ``done`` is not called.

        ``classifier``: the one that the process must have loaded."""
        job = _Job(encode(task), record, done, limit_s, classifier, counted)
        full = len(self._queue) >= MOST_WAITING or self._bytes + job.size > MOST_WAITING_BYTES
        if full or self._closed:
            if counted:
                self.drop("stopping" if self._closed else "full")
            return None
        self._queue.append(job)
        self._bytes += job.size
        self._quiet.clear()
        self._next()
        return job

    async def step(self, task: Task, record: bytes = b"", limit_s: float = STEP_S) -> Step:
        """The same, waited for. Raises LostError."""
        future: asyncio.Future[Step | None] = asyncio.get_running_loop().create_future()

        def done(step: Step | None) -> None:
            if not future.done():
                future.set_result(step)

        job = self.submit(task, record, done, limit_s, counted=False)
        if job is None:
            self.drop("stopping" if self._closed else "full")
            raise LostError("the gateway ends" if self._closed else "there is too much to do")
        try:
            step = await future
        finally:
            job.cancelled = True  # whoever waits for it no longer does; it has no effect once it is done
        if step is None:
            raise LostError("the process ended")
        return step

    def drop(self, reason: str) -> None:
        self._metrics.quality_dropped.labels(reason).inc()

    # going

    async def run(self) -> None:
        """Until cancelled; then the process has ended as well."""
        loop, back_off = asyncio.get_running_loop(), FIRST_BACK_OFF_S
        while True:
            await self._wanted.wait()
            began, self._why, self._replaced = loop.time(), "", False
            try:
                status = await self._one_process()
                why = self._why or f"its exit status is {status}"
            except Exception as error:
                why = repr(error)
            if self._replaced:
                continue
            self._metrics.quality_errors.labels(self.name).inc()
            self._log.error("the process for %s ended: %s; another one is started", self.name, why)
            if loop.time() - began > STEADY_S:
                back_off = FIRST_BACK_OFF_S
            await asyncio.sleep(back_off)
            back_off = min(2 * back_off, LONGEST_BACK_OFF_S)

    async def _one_process(self) -> int | None:
        """Start a process, have it work until it ends, and give its exit status."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        status, connection = None, _Connection(self._received, loop.create_future())
        try:
            with theirs:
                await loop.create_unix_connection(lambda: connection, sock=ours)
                await _to_its_end(asyncio.to_thread(self._spawn, theirs.fileno()))
            self._connection = connection
            limit_s = START_S if self._classifier is None else LOAD_S
            prepare = Prepare(self._classifier, list(self.deadly.marks))
            self._send(_Job(encode(prepare), b"", self._prepared, limit_s, None))
            await connection.lost
        finally:
            self._ready.clear()
            self._connection = None
            ours.close() if connection.transport is None else connection.transport.abort()
            if self._process is not None:
                status = await _to_its_end(asyncio.to_thread(_end, self._process))
                self._process = None
            begun = self._begun
            if (job := self._taken()) is not None:
                if begun is not None and status != 0:
                    self.deadly.add(begun)
                    self._log.warning("checks: a schema over which a process was lost is not looked at again")
                self._finish(job, None)
            if self.idle:
                self._quiet.set()
        return status

    def _spawn(self, descriptor: int) -> None:
        limited = self._classifier is None
        numbers = (descriptor, self._niceness, int(limited))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _COMMAND, _HOUSE, *map(str, numbers)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # What an interpreter says as it dies may quote a prompt.
            stderr=subprocess.DEVNULL,
            pass_fds=(descriptor,),
            process_group=0,
        )

    def _prepared(self, step: Step | None) -> None:
        if step is None:
            return
        if step.error:
            self._log.error("the process for %s: %s", self.name, step.error)
        self._ready.set()

    def _next(self) -> None:
        """Give the process what waits, if it has nothing to do."""
        if self._connection is None:
            self._wanted.set()
            return
        while self._current is None and self._queue:
            if self._queue[0].classifier not in (None, self._classifier):
                self._classifier, self._replaced = self._queue[0].classifier, True
                self._connection.close()
                self._connection = None
                return
            job = self._queue.popleft()
            self._bytes -= job.size
            if not job.cancelled:
                self._send(job)
        if self.idle:
            self._quiet.set()

    def _send(self, job: _Job) -> None:
        assert self._connection
        self._current = job
        self._timer = asyncio.get_running_loop().call_later(job.limit_s, self._overdue)
        self._connection.send(job)

    def _overdue(self) -> None:
        self._why = "it took too long over an answer"
        if self._process is not None:
            self._process.kill()
        if self._connection is not None:
            self._connection.close()

    def _received(self, message: bytes) -> None:
        try:
            step = decode_step(message)
        except msgspec.MsgspecError as error:
            step = Step(error=f"{type(error).__name__} in what it said")
        if step.begins is not None:
            self._begun = step.begins if step.begins != NONE else None
            return
        job = self._taken()
        if job is None:
            return
        self._finish(job, step)
        self._next()

    def _taken(self) -> _Job | None:
        """What the process is busy with, and now is no longer."""
        job, self._current, self._begun = self._current, None, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return job

    def _finish(self, job: _Job, step: Step | None) -> None:
        try:
            job.done(step)
        except Exception:
            self._metrics.quality_errors.labels(self.name).inc()
            self._log.exception("what the process for %s found was lost", self.name)


class _Connection(asyncio.Protocol):
    """Messages with their lengths before them."""

    def __init__(self, received: Callable[[bytes], None], lost: asyncio.Future[None]) -> None:
        self._received = received
        self._buffer = bytearray()
        self.lost = lost
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        while len(buffer) >= HEADER.size:
            end = HEADER.size + HEADER.unpack_from(buffer)[0]
            if len(buffer) < end:
                return
            message = bytes(memoryview(buffer)[HEADER.size : end])
            del buffer[:end]
            self._received(message)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)

    def send(self, job: _Job) -> None:
        assert self.transport
        header = HEADER.pack(len(job.task), len(job.record), round(1000 * job.limit_s))
        self.transport.writelines((header + job.task, job.record))

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()


def _end(process: subprocess.Popen[bytes]) -> int:
    """Its connection is closed: wait for its end, for a while. Gives its exit status."""
    try:
        return process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Wait for it, also where this is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
