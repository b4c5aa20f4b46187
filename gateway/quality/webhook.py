"""Events of the watch to a webhook, in order, each a few times at most."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import aiohttp

from gateway.quality.cells import WatchEvent
from gateway.quality.report import event_as_json
from gateway.telemetry.logs import EVENTS
from gateway.telemetry.metrics import Metrics

TRIES, TIMEOUT_S = 4, 5.0
MOST_WAITING = 1000


class Webhook:
    """``url`` gives the present one, if any. An event that cannot be posted is in the store all the same."""

    def __init__(self, url: Callable[[], str | None], metrics: Metrics) -> None:
        self._url = url
        self._metrics = metrics
        self._log = logging.getLogger(EVENTS)
        self._waiting: asyncio.Queue[WatchEvent] = asyncio.Queue(MOST_WAITING)

    def offer(self, event: WatchEvent) -> None:
        """To be posted, if there is a webhook."""
        if self._url():
            with contextlib.suppress(asyncio.QueueFull):
                self._waiting.put_nowait(event)

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Post until cancelled."""
        while True:
            event = await self._waiting.get()
            try:
                await self._post(session, event)
            except Exception:
                self._metrics.quality_errors.labels("webhook").inc()
                self._log.exception("watch.webhook: an event was not posted; it is in the store")

    async def _post(self, session: aiohttp.ClientSession, event: WatchEvent) -> None:
        url, timeout = self._url(), aiohttp.ClientTimeout(total=TIMEOUT_S)
        for number in range(TRIES if url else 0):
            try:
                async with session.post(str(url), json=event_as_json(event), timeout=timeout) as answer:
                    if answer.status < 500:
                        return
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                if number == TRIES - 1:
                    # Not its address, which may hold a secret.
                    what = type(error).__name__
                    self._log.error("watch.webhook: %s; the event is in the store", what)
            await asyncio.sleep(0.25 * 2**number)
