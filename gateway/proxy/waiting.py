"""Requests that wait for a replica: of a pool that starts, or that is full."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from gateway.errors import NoReplicaError
from gateway.proxy.exchange import Exchange

LOOK_AGAIN_S = 0.25
"""How often the first in a line looks for a replica that nobody told it of: one that has started."""

LineKey = tuple[str, str, tuple[str, ...]]
"""Role, model, and the models that the key may use: requests that want the same replicas."""


class WaitingLines:
    """A line for all that want the same. Only its first one tries; whoever came first is served first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.lines: dict[LineKey, dict[Exchange, asyncio.Event]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.lines.values()))

    def waits(self, key: LineKey) -> bool:
        """Whether somebody is in line already: a new request goes behind, or it would jump the queue."""
        return key in self.lines

    def wake(self) -> None:
        """A request has ended: there may be room."""
        for line in self.lines.values():
            next(iter(line.values())).set()

    async def wait(
        self, key: LineKey, exchange: Exchange, until: float, attempt: Callable[[Exchange], None]
    ) -> None:
        """Call ``attempt`` until it finds a replica. Raises what it raises, NoReplicaError when ``until`` (of
        the clock) has come."""
        line = self.lines.setdefault(key, {})
        woken = line[exchange] = asyncio.Event()
        woken.set()
        try:
            while (left := until - self._clock()) > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left, LOOK_AGAIN_S)):
                        await woken.wait()
                woken.clear()
                if next(iter(line)) is exchange:
                    try:
                        attempt(exchange)
                    except NoReplicaError as error:
                        if not error.may_wait:  # the pool is up, and full: the role refuses then
                            raise
                    else:
                        return
            if next(iter(line)) is not exchange:
                raise NoReplicaError("Requests that came before still wait for a replica; try again later.")
            attempt(exchange)
        finally:
            del line[exchange]
            if line:
                next(iter(line.values())).set()
            else:
                del self.lines[key]
