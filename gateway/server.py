"""uvicorn holds the listening socket and the application's life; signals are events of the event loop.

SIGTERM and SIGINT stop listening, let running requests finish for ``gateway.shutdown_timeout_s``, and end
the application. SIGHUP reads the configuration anew. Python's own handlers run between any two steps of the
program, also where a lock is held; nothing is done in them.
"""

from __future__ import annotations

import asyncio
import gc
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from gateway.app import Gateway
from gateway.config import ConfigError, GatewaySettings
from gateway.reloading import reload_when_told
from gateway.workers.channel import ToParent

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LEFT_BEHIND_S = 1.0
"""After the application has ended, for what still runs in threads or does not obey."""


def listen(gateway: GatewaySettings) -> socket.socket:
    """A listening socket. Raises ConfigError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in gateway.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if gateway.workers > 1:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listening.bind((gateway.host, gateway.port))
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"gateway.port: {gateway.host}:{gateway.port} cannot be listened on ({error.strerror}); "
            "stop what uses it or set another port"
        ) from None
    return listening


class Server(uvicorn.Server):
    """uvicorn's server with signals as events. ``parent``: the way to it, in a worker."""

    def __init__(self, gateway: Gateway, parent: ToParent | None = None) -> None:
        super().__init__(_config(gateway))
        self._gateway = gateway
        self._parent = parent
        self._tasks: set[asyncio.Task[None]] = set()
        self._hung_up = asyncio.Event()
        """SIGHUP has come since the file was last read."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._parent is not None:
            self._tasks.add(asyncio.create_task(self._obey(self._parent)))
            await self._parent.may_begin.wait()
        gc.collect()
        await super().startup(sockets)
        # What is there by now stays. When Python looks through all of it for garbage, as it does from time to
        # time, everybody waits for 80 ms.
        gc.freeze()

    def serve_until_stopped(self, listening: socket.socket) -> None:
        """Serve until a signal, then let running requests finish. What is left after that does not keep the
        process from ending, and signals that come late do not change its exit status."""

        async def serve() -> None:
            await self.serve(sockets=[listening])
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            _end_in(LEFT_BEHIND_S)

        with asyncio.Runner(loop_factory=self.config.get_loop_factory()) as runner:
            runner.run(serve())

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """For as long as the server runs."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop, number)
        if self._parent is None:  # a worker is told by its parent
            loop.add_signal_handler(signal.SIGHUP, self._hung_up.set)
            self._tasks.add(loop.create_task(reload_when_told(self._hung_up, self._gateway.reload)))
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
            for task in self._tasks:
                task.cancel()

    def _stop(self, number: int) -> None:
        seconds = self._gateway.plane.snapshot.config.gateway.shutdown_timeout_s
        self.config.timeout_graceful_shutdown = math.ceil(seconds)
        if self.should_exit and number == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True
        self._gateway.stopping_since = self._gateway.stopping_since or time.monotonic()
        if self._parent is not None:
            self._parent.may_begin.set()

    async def _obey(self, parent: ToParent) -> None:
        """Until the parent is gone: then this worker ends too, for nobody would start it again."""
        await parent.run(self._gateway.reloads)
        self._stop(signal.SIGTERM)


def _config(gateway: Gateway) -> uvicorn.Config:
    limits = gateway.plane.snapshot.config.gateway
    return uvicorn.Config(
        gateway.app,
        loop="uvloop",
        http=gateway.protocol,  # type: ignore[arg-type]
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(limits.shutdown_timeout_s),
        ssl_certfile=limits.tls_certificate,
        ssl_keyfile=limits.tls_key,
    )


def _end_in(seconds: float) -> None:
    """End the process then, whatever still runs: a look-up of a name or a database that does not answer
    holds up a thread for minutes."""
    timer = threading.Timer(seconds, os._exit, (0,))
    timer.daemon = True
    timer.start()
