"""The background probe of every replica's ``/health``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import aiohttp

from gateway.routing.pools import Replica

PROBE_TIMEOUT_S = 5.0


async def probe(session: aiohttp.ClientSession, replica: Replica) -> None:
    """Ask one replica. Silence changes nothing: an engine at full load answers late and still works."""
    timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
    try:
        async with session.get(replica.url + "/health", timeout=timeout) as response:
            healthy = response.status == 200
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
        healthy = False
    except (TimeoutError, aiohttp.ClientError):
        return
    replica.reachable = healthy
    if healthy:
        replica.breaker.healthy()
    else:
        replica.breaker.not_reached()


async def probe_forever(
    session: aiohttp.ClientSession, replicas: Callable[[], Iterable[Replica]], interval_s: float
) -> None:
    """Probe every one of ``replicas()``, which may change, each ``interval_s`` seconds; one that hangs holds
    up no other."""
    running: dict[Replica, asyncio.Task[None]] = {}
    try:
        while True:
            for replica in replicas():
                if replica not in running or running[replica].done():
                    running[replica] = asyncio.create_task(probe(session, replica))
            running = {replica: task for replica, task in running.items() if not task.done()}
            await asyncio.sleep(interval_s)
    finally:
        for task in running.values():
            task.cancel()
        await asyncio.gather(*running.values(), return_exceptions=True)
