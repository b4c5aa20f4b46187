"""The background probe of every replica's ``/health``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

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
    session: aiohttp.ClientSession, replicas: Iterable[Replica], interval_s: float
) -> None:
    """Probe every replica each ``interval_s`` seconds; one that hangs holds up no other."""

    async def probe_one(replica: Replica) -> None:
        while True:
            await probe(session, replica)
            await asyncio.sleep(interval_s)

    await asyncio.gather(*(probe_one(replica) for replica in replicas))
