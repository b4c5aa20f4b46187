"""How many engines start, and how many answer, at a time while variants are measured."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deploy.placement import Machine
from gateway.config import ModelConfig

ENGINES_AT_ONCE = 2
"""While one engine answers, the next one starts, or answers too where it has cores of its own."""


def running_at_once(machine: Machine) -> int:
    """Engines that run beside each other, where there is room for them."""
    return ENGINES_AT_ONCE if machine.gpus else min(ENGINES_AT_ONCE, max(1, machine.cores))


def answering_at_once(model: ModelConfig, machine: Machine) -> int:
    """Engines that can answer side by side without taking each other's cores; 1 where they use all."""
    if machine.gpus:
        return ENGINES_AT_ONCE
    threads = model.engine.env.get("OMP_NUM_THREADS", "1")
    if not threads.isdigit() or not int(threads):
        return 1
    return max(1, min(ENGINES_AT_ONCE, machine.cores // int(threads)))


class Turns:
    """Lets so many engines answer side by side, or one alone."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._free = asyncio.Semaphore(most)
        self._first = asyncio.Lock()

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """A turn beside others."""
        async with self._free:
            yield

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """A turn while no other engine answers. It is not to be taken within another turn."""
        taken = 0
        async with self._first:
            try:
                for _ in range(self._most):
                    await self._free.acquire()
                    taken += 1
                yield
            finally:
                for _ in range(taken):
                    self._free.release()
