"""A configuration file that is read anew whenever somebody says so: SIGHUP, to a gateway or to its parent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from gateway.config import ConfigError
from gateway.telemetry.logs import EVENTS
from quantize.card import CardError


async def reload_when_told(told: asyncio.Event, take: Callable[[], Awaitable[object]]) -> None:
    """``take`` the file over as it is, for ever and one after another: what is told meanwhile has it read
    once more, as it is then. One that cannot be used changes nothing; that is said in the log."""
    events = logging.getLogger(EVENTS)
    while True:
        await told.wait()
        told.clear()
        try:
            await take()
        except (ConfigError, CardError) as error:
            events.error("the configuration was not changed: %s", error)
        except Exception:
            events.exception("the configuration was not changed")
        else:
            events.info("the configuration was read anew")
