"""The parent of several workers: it starts them, starts them again, and hands them one configuration.

A worker that ends is started anew after a back-off, with the configuration that was last accepted; what the
file says by then does not matter, so a mistake in it stops nobody. Only before the first worker is ready
does one that cannot start end the gateway. SIGHUP reads the file, SIGTERM and SIGINT end everything; both
are events of the loop, and nothing that the parent does holds them up.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from gateway.config import Config, ConfigError, refuse_fixed
from gateway.reloading import reload_when_told
from gateway.telemetry.logs import EVENTS
from gateway.workers.board import Board
from gateway.workers.channel import Lines, Message
from quantize.card import CardError

CANNOT_START = 2
NO_PROCESS = -1
STEADY_S = 30.0
FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.5, 30.0
PREPARE_S = 60.0
"""A worker that takes longer to prepare a configuration has refused it."""
MARGIN_S = 5.0
"""How much longer than its running requests a worker may take to end."""

Check = Callable[[str, str], Config]
"""Validates the text of a configuration, which errors call by the second argument. Raises ConfigError or
CardError."""


class Worker:
    """One of the processes, and the parent's end of the channel to it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: asyncio.subprocess.Process | None = None
        self.ready = asyncio.Event()
        self.generation = 0
        """The number of the configuration that it has."""
        self._lines: Lines | None = None
        self._answers: dict[tuple[str, int], asyncio.Future[str | None]] = {}
        self._ending = False

    async def run(self, command: list[str], first: Message, received: Callable[[Message], None]) -> int:
        """Start it and wait for its end; its exit status. ``received`` gets what it says unasked. Raises
        OSError when it cannot be started."""
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as otherwise:
            otherwise.callback(ours.close)
            self.process = await asyncio.create_subprocess_exec(
                *command,
                *("--worker", str(self.number), "--channel", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
            )
            otherwise.pop_all()
        if self._ending:
            self.signal(signal.SIGTERM)  # there was no process yet when all were told to end
        self._lines = Lines(ours)
        await self._lines.connect()
        listening = asyncio.create_task(self._lines.each(lambda message: self._received(message, received)))
        try:
            self._lines.send(first)
            return await self.process.wait()
        finally:
            self.ready.clear()
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            for waiting in self._answers.values():
                if not waiting.done():
                    waiting.set_result(None)  # it will begin with the new configuration
            self._answers.clear()

    def _received(self, message: Message, other: Callable[[Message], None]) -> None:
        for kind in ("prepared", "committed"):
            if kind in message:
                waiting = self._answers.pop((kind, message[kind]), None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(message.get("error"))
                return
        other(message)

    async def ask(self, message: Message, kind: str, generation: int) -> str | None:
        """What it has against it; None if nothing, or if it ends meanwhile."""
        key = (kind, generation)
        waiting = self._answers[key] = asyncio.get_running_loop().create_future()
        if not self.tell(message):
            waiting.set_result(None)
        try:
            async with asyncio.timeout(PREPARE_S):
                error: str | None = await waiting
                return error
        except TimeoutError:
            return f"workers: worker {self.number} does not answer; nothing was changed"
        finally:
            self._answers.pop(key, None)

    def tell(self, message: Message) -> bool:
        return self._lines is not None and self._lines.send(message)

    def end(self) -> None:
        """Have it end, also when it is only being started."""
        self._ending = True
        self.signal(signal.SIGTERM)

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


class Parent:
    """``text``: the configuration that was read and validated at the start."""

    def __init__(self, config: Config, text: str, path: Path, check: Check) -> None:
        self._config, self._text, self._path, self._check = config, text, path, check
        self._generation = 0
        self._command = [sys.executable, "-m", "gateway", "--config", str(path)]
        self._workers = [Worker(number) for number in range(config.gateway.workers)]
        self._directory = config.run_dir / "workers"
        self._stopping = asyncio.Event()
        self._hung_up = asyncio.Event()
        """SIGHUP has come since the file was last read."""
        self._status = 0
        self._begun = False
        """Whether a worker has ever been ready."""
        self._reloading = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._events = logging.getLogger(EVENTS)

    async def run(self) -> int:
        """Until SIGTERM or SIGINT. The exit status is 0, or that of a worker that could not start at all."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._hung_up.set)
        self._spawn(reload_when_told(self._hung_up, self._reload))
        running = [asyncio.create_task(self._keep(self._workers[0]))]
        # The others begin when one can: a configuration that none can use is said once.
        await self._first_of(self._workers[0].ready.wait(), self._stopping.wait())
        if not self._stopping.is_set():
            running += [asyncio.create_task(self._keep(worker)) for worker in self._workers[1:]]
        await self._stopping.wait()
        for worker in self._workers:
            worker.end()
        _, left = await asyncio.wait(running, timeout=self._config.gateway.shutdown_timeout_s + MARGIN_S)
        if left:
            self._events.error("%d workers did not end in time and are killed", len(left))
            for worker in self._workers:
                worker.signal(signal.SIGKILL)
            await asyncio.wait(left, timeout=MARGIN_S)
        for task in (*self._tasks, *running):
            task.cancel()
        await asyncio.gather(*self._tasks, *running, return_exceptions=True)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)  # what comes late does not change the exit status
        return self._status

    async def _keep(self, worker: Worker) -> None:
        """Keep a worker running until the gateway stops."""
        back_off = FIRST_BACK_OFF_S
        while not self._stopping.is_set():
            began = time.monotonic()
            first = {"configuration": self._text, "generation": self._generation}
            try:
                status = await worker.run(
                    self._command, first, lambda message: self._received(worker, message)
                )
                self._clear(worker)
            except OSError as error:  # no process can be had now, no file opened
                self._events.error("worker %d cannot be kept running: %s", worker.number, error)
                status = NO_PROCESS
            if self._stopping.is_set():
                return
            if status == CANNOT_START and not self._begun:
                self._status = status  # it has said why
                self._stopping.set()
                return
            if time.monotonic() - began > STEADY_S:
                back_off = FIRST_BACK_OFF_S
            self._events.error(
                "worker %d ended with status %d; starting it again in %.1f s%s",
                *(worker.number, status, back_off, self._difference()),
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), back_off)
            back_off = min(2 * back_off, LONGEST_BACK_OFF_S)

    def _difference(self) -> str:
        try:
            same = self._path.read_text(encoding="utf-8") == self._text
        except (OSError, UnicodeDecodeError):
            same = False
        return (
            "" if same else f" with the configuration that was last accepted, not {self._path} as it is now"
        )

    def _clear(self, worker: Worker) -> None:
        """What it had in flight is no more."""
        board = Board(self._directory / "board", worker.number, len(self._workers))
        board.close()

    def _received(self, worker: Worker, message: Message) -> None:
        match message:
            case {"ready": generation}:
                self._begun = True
                worker.generation = generation
                worker.ready.set()
                self._spawn(self._catch_up(worker))
            case {"replace": text, "number": number}:
                self._spawn(self._replace_for(worker, text, number))

    async def _replace_for(self, worker: Worker, text: str, number: int) -> None:
        error = None
        try:
            await self.replace(text, "the configuration sent")
        except (ConfigError, CardError) as refused:
            error = str(refused)
        worker.tell({"answer": number, "error": error})

    async def _reload(self) -> None:
        """Take the file as it is now. Raises what :meth:`replace` does."""
        try:
            text = await asyncio.to_thread(self._path.read_text, encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self._path} cannot be read: {error}") from None
        await self.replace(text, str(self._path))

    async def replace(self, text: str, source: str) -> None:
        """Have all workers use another configuration. Raises ConfigError or CardError, and then none does."""
        async with self._reloading:
            config = await asyncio.to_thread(self._check, text, source)
            refuse_fixed(config, self._config)  # there may be no worker now that would
            generation = self._generation + 1
            ready = [worker for worker in self._workers if worker.ready.is_set()]
            prepare = {"prepare": text, "generation": generation}
            answers = await asyncio.gather(*(one.ask(prepare, "prepared", generation) for one in ready))
            error = next(filter(None, answers), None)
            if error is not None:
                for worker in ready:
                    worker.tell({"drop": generation})
                raise ConfigError(error)
            self._config, self._text, self._generation = config, text, generation
            await asyncio.gather(*(self._commit(worker, generation) for worker in ready))

    async def _commit(self, worker: Worker, generation: int) -> None:
        if await worker.ask({"commit": generation}, "committed", generation) is not None:
            worker.signal(signal.SIGKILL)  # it would serve the old configuration for ever
        worker.generation = generation

    async def _catch_up(self, worker: Worker) -> None:
        """Have a worker begin, with the configuration that was accepted since it was started, if any."""
        async with self._reloading:
            generation = self._generation
            if worker.generation == generation:
                worker.tell({"begin": generation})
                return
            prepare = {"prepare": self._text, "generation": generation}
            if await worker.ask(prepare, "prepared", generation) is None:
                await self._commit(worker, generation)
                worker.tell({"begin": generation})
            else:
                worker.signal(signal.SIGTERM)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _first_of(self, *waiting: Coroutine[Any, Any, Any]) -> None:
        tasks = [asyncio.create_task(one) for one in waiting]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def run_workers(config: Config, text: str, path: Path, check: Check) -> int:
    """Keep the configured number of workers running. Raises ConfigError when the run directory is another
    gateway's."""
    directory = config.run_dir / "workers"
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"run_dir: {config.run_dir} is in use by another gateway; stop it or set another run_dir"
            ) from None
        for old in (*directory.glob("counters-*"), directory / "board"):
            old.unlink(missing_ok=True)
        return asyncio.run(Parent(config, text, path, check).run())
    finally:
        os.close(lock)


def receive_first(connection: socket.socket) -> tuple[str, int]:
    """A new worker's configuration and its number, as the parent sends them. Raises ConfigError."""
    data = b""
    while not data.endswith(b"\n"):
        part = connection.recv(1 << 16)
        if not part:
            raise ConfigError("workers: the parent process is gone")
        data += part
    first = json.loads(data)
    return str(first["configuration"]), int(first["generation"])
