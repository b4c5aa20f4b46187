"""Replicas that are found by name: ``dns+http://engines.default.svc:8000`` is one replica per address.

A headless service of Kubernetes is such a name: its addresses are those of the pods that are ready.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlsplit

from gateway.config import Config, shown_url
from gateway.routing.pools import Pools
from gateway.telemetry.logs import EVENTS

PREFIX = "dns+"
INTERVAL_S = 5.0

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Addresses of a host, for a port. Raises OSError."""


async def resolve(host: str, port: int) -> Sequence[str]:
    """By the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return sorted({str(address[4][0]) for address in found})


class Discovery:
    """Knows the present replicas of every pool. A name that cannot be resolved keeps what it had last."""

    def __init__(self, resolver: Resolve = resolve) -> None:
        self._resolve = resolver
        self._found: dict[str, tuple[str, ...]] = {}

    def replicas(self, config: Config, variant: str) -> tuple[str, ...]:
        """Base URLs, names replaced by what they were last found to stand for."""
        urls: list[str] = []
        for url in config.replicas(variant):
            urls += self._found.get(url, ()) if url.startswith(PREFIX) else (url,)
        return tuple(dict.fromkeys(urls))

    def differs(self, config: Config, pools: Pools) -> bool:
        """Whether pools have other replicas than those that are known by now."""
        return any(
            self.replicas(config, variant) != tuple(replica.url for replica in pool.replicas)
            for variant, pool in pools.by_variant.items()
        )

    async def look(self, config: Config) -> None:
        """Resolve every name of a configuration once."""
        names = {
            url for variant in config.served for url in config.replicas(variant) if url.startswith(PREFIX)
        }
        await asyncio.gather(*(self._look_up(name) for name in names))

    async def _look_up(self, name: str) -> None:
        parts = urlsplit(name.removeprefix(PREFIX))
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            addresses = await self._resolve(parts.hostname or "", port)
        except OSError as error:
            logging.getLogger(EVENTS).warning("%s cannot be resolved: %s", shown_url(name), error)
            return
        hosts = [f"[{address}]" if ":" in address else address for address in addresses]
        who, at, _ = parts.netloc.rpartition("@")  # each is asked with the name and password of all
        self._found[name] = tuple(f"{parts.scheme}://{who}{at}{host}:{port}{parts.path}" for host in hosts)
