"""A model's reference, for whoever has something to ask it: through the gateway where that serves it, else on
an engine that is started for it, where there is room."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

from deploy.door import Door
from deploy.models import checkpoint_of, registry_of
from deploy.unlabelled import variant_engine
from gateway.config import ModelConfig
from quantize.card import Card

Say = Callable[[str], None]
LOOK_S = 5.0


@dataclass(frozen=True)
class Reached:
    """Where a reference answers, and by which name."""

    door: Door
    model: str
    card: Card


@asynccontextmanager
async def reference_of(model: ModelConfig, door: Door | None, say: Say) -> AsyncIterator[Reached]:
    """The reference, which answers inside the block. ``door``: of the gateway, if it is to be asked. Raises
    EngineStartError and PlacementError."""
    card = registry_of(model, say).add_reference(checkpoint_of(model, say))
    if door is not None and model.reference in model.serve and await _serves(door, card.id):
        say(f"{card.id} is asked through the gateway at {door.url}")
        yield Reached(door, card.id, card)
        return
    async with variant_engine(model, card, say) as spec:
        yield Reached(Door(spec.url), card.model, card)


async def _serves(door: Door, variant: str) -> bool:
    """Whether a gateway runs there and reaches the variant."""
    timeout = aiohttp.ClientTimeout(total=LOOK_S)
    connector = aiohttp.TCPConnector(ssl=not door.local)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
            session.get(f"{door.url}/readiness", headers=door.headers) as response,
        ):
            return variant not in json.loads(await response.text())["not_reachable"]
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError):
        return False
