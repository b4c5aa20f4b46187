"""The background probe of every replica's ``/health``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import aiohttp

from gateway.routing.replicas import Replica

PROBE_TIMEOUT_S = 5.0


async def probe(session: aiohttp.ClientSession, replica: Replica) -> None:
    """Ask one replica. Silence changes nothing: an engine at full load answers late and still works."""
    timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
    try:
        async with session.get(
            replica.base + "/health", headers=replica.credentials, timeout=timeout, allow_redirects=False
        ) as response:
            healthy = response.status == 200
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
        healthy = False
    except (TimeoutError, aiohttp.ClientError):
        replica.reachable = replica.reachable or False  # it was asked, at least
        return
    replica.reachable = healthy
    if healthy:
        replica.breaker.healthy()
    else:
        replica.breaker.not_reached()


class Prober:
    """Asks all replicas, over and over; one that hangs holds up no other."""

    def __init__(self, session: aiohttp.ClientSession, replicas: Callable[[], Iterable[Replica]]) -> None:
        """``replicas()`` gives the present ones."""
        self._session = session
        self._replicas = replicas
        self._running: dict[Replica, asyncio.Task[None]] = {}

    async def once(self) -> None:
        """Begin to ask every replica that is not being asked. Raises what an earlier probe has raised."""
        over = [replica for replica, task in self._running.items() if task.done()]
        ended = [self._running.pop(replica) for replica in over]
        for replica in self._replicas():
            if replica not in self._running:
                self._running[replica] = asyncio.create_task(probe(self._session, replica))
        failures = [error for task in ended if (error := _failure(task)) is not None]
        if failures:
            raise failures[0]

    async def stop(self) -> None:
        """Ask nobody any more."""
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)


def _failure(task: asyncio.Task[None]) -> BaseException | None:
    return None if task.cancelled() else task.exception()
