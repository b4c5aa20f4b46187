"""What parent and worker say to each other: JSON, a line per message, over a pair of sockets.

The parent's first line has the configuration to begin with. A worker that is about to listen says so, and
begins when it is told to, so that none serves a configuration that was replaced meanwhile. It hands on what
a client has sent as a new configuration. The parent hands a configuration to all workers in two steps: each
prepares it and says whether it can be used; only then all are told to commit it, or else to drop it. When
the parent is gone, its workers end.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from collections.abc import Callable
from typing import Any, Protocol

from gateway.config import ConfigError

LONGEST_LINE = 64 << 20
REPLACE_S = 120.0

Message = dict[str, Any]


class Reloads(Protocol):
    """What a worker does with a new configuration."""

    async def prepare(self, text: str) -> None:
        """Raises ValueError for one that cannot be used."""

    def commit(self) -> None:
        """Use what was prepared."""

    def drop(self) -> None:
        """Do not use it."""


class Lines:
    """Messages over a socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def connect(self) -> None:
        """Before anything else."""
        self._reader, self._writer = await asyncio.open_connection(sock=self._connection, limit=LONGEST_LINE)

    async def each(self, received: Callable[[Message], None]) -> None:
        """Call for every message until the other side is gone."""
        assert self._reader is not None
        assert self._writer is not None
        try:
            while line := await self._reader.readline():
                received(json.loads(line))
        except (OSError, ValueError):
            pass  # it is gone, or was cut off within a line
        finally:
            self._writer.close()

    def send(self, message: Message) -> bool:
        """Whether it could be sent."""
        if self._writer is None or self._writer.is_closing():
            return False
        self._writer.write(json.dumps(message).encode() + b"\n")
        return True


class ToParent:
    """A worker's end."""

    def __init__(self, connection: socket.socket, generation: int) -> None:
        """``generation``: the number of the configuration that the worker begins with."""
        self._lines = Lines(connection)
        self._generation = generation
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[str | None]] = {}
        self._preparing: asyncio.Task[None] | None = None
        self.may_begin = asyncio.Event()
        """The worker has the present configuration, or the parent is gone."""

    async def run(self, reloads: Reloads) -> None:
        """Say that the worker is ready, and obey until the parent is gone."""

        def received(message: Message) -> None:
            match message:
                case {"prepare": text, "generation": generation}:
                    self._preparing = asyncio.create_task(self._prepare(reloads, text, generation))
                case {"commit": generation}:
                    reloads.commit()
                    self._generation = generation
                    self._lines.send({"committed": generation})
                case {"begin": _}:
                    self.may_begin.set()
                case {"drop": _}:
                    if self._preparing is not None:
                        self._preparing.cancel()  # it may still be at it
                    reloads.drop()
                case {"answer": number, "error": error}:
                    if (waiting := self._asked.pop(number, None)) is not None and not waiting.done():
                        waiting.set_result(error)

        await self._lines.connect()
        self._lines.send({"ready": self._generation})
        try:
            await self._lines.each(received)
        finally:
            self.may_begin.set()

    async def _prepare(self, reloads: Reloads, text: str, generation: int) -> None:
        error = None
        try:
            await reloads.prepare(text)
        except Exception as refused:
            error = str(refused) if isinstance(refused, ValueError) else repr(refused)
        self._lines.send({"prepared": generation, "error": error})

    async def replace(self, text: str) -> None:
        """Have all workers use another configuration. Raises ConfigError, and then none does."""
        number = next(self._numbers)
        waiting = self._asked[number] = asyncio.get_running_loop().create_future()
        if not self._lines.send({"replace": text, "number": number}):
            raise ConfigError("workers: the gateway's parent process does not answer; start the gateway anew")
        try:
            async with asyncio.timeout(REPLACE_S):
                error = await waiting
        except TimeoutError:
            error = "workers: the gateway's parent process does not answer; try again"
        finally:
            self._asked.pop(number, None)
        if error is not None:
            raise ConfigError(error)
