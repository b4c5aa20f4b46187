"""Asks engines on the watch's behalf: scores, second answers, copies, a judge. Never ahead of a user.

A bounded queue, a few requests at a time, of the lowest priority, none while the replica is busy; what does
not fit is given up, the oldest first, and counted. Bodies and answers are bytes here.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping

import aiohttp
import msgspec

from gateway.config import WatchSettings
from gateway.quality.examiner import CHAT, TOKENIZE, UnansweredError
from gateway.routing.pools import Pools
from gateway.routing.replicas import Replica
from gateway.telemetry.logs import EVENTS
from gateway.telemetry.metrics import Metrics
from gateway.upstream.whole import read_whole

LATER = 3
LONGEST_ANSWER = 64 << 20
"""Bytes of an engine's answer; a score of a long prompt has a row for each of its tokens."""
_LOOK_AGAIN_S = 0.05
_AFTER_A_DEFECT_S = 1.0
_NO_PRIORITY = b"priority"
"""What vLLM's refusal says when it was started without ``--scheduling-policy priority``."""


class ShedError(RuntimeError):
    """The replica is busy with users' requests, or there is none."""


Work = Callable[[], Awaitable[None]]
Provider = Callable[[str, bytes], Awaitable[bytes]]
"""Gives a provider's model a chat completion's body, and its answer back, as JSON. May raise anything."""


class Inquiry:
    """The queue, and the way to the engines. ``pools`` gives the present ones."""

    def __init__(
        self,
        settings: WatchSettings,
        references: Mapping[str, str],
        pools: Callable[[], Pools],
        metrics: Metrics,
        provider: Provider | None = None,
    ) -> None:
        """``references``: of every model. ``provider``: the way to models that no pool of ours serves."""
        self.settings = settings
        self.references = references
        self._pools = pools
        self._metrics = metrics
        self._provider = provider
        self._queue: deque[tuple[Work, Callable[[], None]]] = deque()
        self._later: deque[tuple[Work, Callable[[], None]]] = deque()
        self._taken = 0
        self._more = asyncio.Event()
        self._session: aiohttp.ClientSession | None = None
        self._plain: set[str] = set()
        """Replicas that know no priorities."""
        self.under_way = 0

    def offer(self, work: Work, given_up: Callable[[], None] = lambda: None, *, later: bool = False) -> None:
        """Do it when there is time; ``later``: mostly after everything else. ``given_up`` is called
        instead when there is no time."""
        queue = self._later if later else self._queue
        if len(queue) >= self.settings.queue:
            queue.popleft()[1]()
        queue.append((work, given_up))
        self._more.set()

    @property
    def idle(self) -> bool:
        return not self._queue and not self._later and not self.under_way

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Work until cancelled."""
        self._session = session
        async with asyncio.TaskGroup() as group:
            for _ in range(self.settings.in_flight):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            while not self._queue and not self._later:
                self._more.clear()
                await self._more.wait()
            work, given_up = self._next()
            self.under_way += 1
            try:
                await self._do(work, given_up)
            except Exception:
                self._metrics.quality_errors.labels("inquiry").inc()
                logging.getLogger(EVENTS).exception("an inquiry failed")
                await asyncio.sleep(_AFTER_A_DEFECT_S)
            finally:
                self.under_way -= 1

    async def _do(self, work: Work, given_up: Callable[[], None]) -> None:
        try:
            await work()
        except ShedError:
            given_up()
            await asyncio.sleep(_LOOK_AGAIN_S)

    def _next(self) -> tuple[Work, Callable[[], None]]:
        """The first that came; of what may come later, one in ``LATER`` even when there is other work."""
        self._taken += 1
        late = self._later and (not self._queue or self._taken % LATER == 0)
        return (self._later if late else self._queue).popleft()

    def replica(self, variant: str) -> Replica:
        """The least busy one of a variant. Raises ShedError when users need them all."""
        pool = self._pools().by_variant.get(variant)
        free = [one for one in pool.usable() if one.in_flight < self.settings.busy_at] if pool else []
        if not free:
            raise ShedError(f"{variant} is busy or down")
        return min(free, key=lambda one: one.in_flight)

    async def ask(self, variant: str, path: str, body: bytes) -> bytes:
        """What an engine of a variant answers to a POST. ``body`` is a JSON object that is not empty, and
        names neither a model nor a priority. Raises UnansweredError or ShedError."""
        replica = self.replica(variant)
        whole = _with(body, b'"model":%b' % msgspec.json.encode(replica.model))
        if path == TOKENIZE or not self.settings.priority or replica.url in self._plain:
            status, raw = await self._post(replica, path, whole)
        else:
            urgent = _with(whole, b'"priority":%d' % self.settings.priority)
            status, raw = await self._post(replica, path, urgent)
            if status == 400 and _NO_PRIORITY in raw:
                self._plain.add(replica.url)
                status, raw = await self._post(replica, path, whole)
        if status != 200:
            raise UnansweredError(f"{replica.name}{path} answered with status {status}")
        return raw

    async def ask_judge(self, judge: str, body: bytes) -> bytes:
        """The judge's answer: a model itself is its reference, ``model:variant`` a pool, else a provider.
        Raises UnansweredError or ShedError."""
        variant = self.references.get(judge, judge)
        if variant in self._pools().by_variant:
            return await self.ask(variant, CHAT, body)
        if self._provider is None:
            raise UnansweredError(f"{judge} is no model of ours, and there are no providers")
        try:
            return await self._provider(judge, body)
        except Exception as error:
            # A provider may have been removed meanwhile, and its libraries raise what they like.
            raise UnansweredError(f"the judge {judge} gave no answer ({type(error).__name__})") from None

    async def _post(self, replica: Replica, path: str, body: bytes) -> tuple[int, bytes]:
        if self._session is None:
            raise UnansweredError("nobody is there to ask")
        timeout = aiohttp.ClientTimeout(total=self.settings.timeout_s)
        headers = {"content-type": "application/json", **replica.credentials}
        url = replica.base + path
        try:
            async with self._session.post(  # no engine sends what it was asked, and its key, elsewhere
                url, data=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                return response.status, await read_whole(response, LONGEST_ANSWER)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise UnansweredError(f"{url}: {type(error).__name__}") from None


def _with(body: bytes, field: bytes) -> bytes:
    """A JSON object that is not empty, with one more field."""
    return b"%b,%b}" % (body[:-1], field)
