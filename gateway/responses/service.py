"""The store as the event loop sees it: reads that are awaited, writes that nobody waits for.

All of the database's work is done in threads. One that fails or hangs is tried again once a second by
``tend`` alone: whoever needs it meanwhile gets a StoreDownError at once, and whoever does not goes on without
being kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from gateway.config import ApiKey, Config, ResponsesSettings
from gateway.errors import StoreDownError
from gateway.responses.store import ResponseStore, Stored
from gateway.store.database import MEMORY, StoreError, configured_url
from gateway.telemetry.logs import EVENTS
from gateway.telemetry.metrics import Metrics

TIMEOUT_S = 5.0
"""For one answer of the database."""
PRUNE_S = 60.0
MOST_WAITING = 256
MOST_WAITING_BYTES = 64 << 20
"""Of calls that wait for the database, and of responses that wait to be written."""
_LOOK_AGAIN_S = (0.05, 0.2)
"""Another process may still be writing what its client has just been given the id of."""
_THREADS = 4
_DOWN = "The store of responses cannot be used now; try again, or send the whole conversation as `input`."

T = TypeVar("T")


class Responses:
    """Everything that is kept, for the whole process."""

    def __init__(
        self,
        settings: ResponsesSettings,
        url: str,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``url`` as ``store_url`` gives it; ``clock`` is Unix time. The database is opened when it is first
        needed."""
        self.settings = settings
        self._url = url
        self._metrics = metrics
        self._clock = clock
        self._store: ResponseStore | None = None
        # A database in memory is one connection, which is one thread's at a time.
        self._threads = ThreadPoolExecutor(1 if url == MEMORY else _THREADS, "responses")
        self._opening = asyncio.Lock()
        self._writes: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._writing_bytes = 0
        self._calls = 0
        self._down = self._closed = False
        self._pruned_at = time.monotonic()

    def know(self, settings: ResponsesSettings) -> None:
        """Limits have changed."""
        self.settings = settings
        if self._store is not None:
            self._store.limits = settings

    @property
    def usable(self) -> bool:
        """Whether the database is not known to fail."""
        return self._calls < MOST_WAITING and not self._down

    def now(self) -> float:
        """Unix time."""
        return self._clock()

    def keep(self, stored: Stored) -> None:
        """Write it when the database can; count it as dropped if that cannot be."""
        if stored.size > self.settings.max_tenant_bytes:
            self.dropped("too_large")
        elif not self.usable:
            self.dropped("store_down")
        elif len(self._writes) >= MOST_WAITING or self._writing_bytes + stored.size > MOST_WAITING_BYTES:
            self.dropped("busy")
        else:
            key = (stored.owner, stored.id)
            before = self._writes.get(key)
            self._writing_bytes += stored.size
            self._writes[key] = asyncio.get_running_loop().create_task(self._write(stored, before))

    async def _write(self, stored: Stored, before: asyncio.Task[None] | None) -> None:
        try:
            if before is not None:
                await before
            await self.put(stored)
        except StoreDownError:
            self.dropped("store_down")
        finally:
            self._writing_bytes -= stored.size
            if self._writes.get(key := (stored.owner, stored.id)) is asyncio.current_task():
                del self._writes[key]

    async def put(self, stored: Stored) -> None:
        """Write it now. Raises StoreDownError."""
        await self._call(lambda store: store.put(stored))
        self._metrics.responses_stored.labels().inc()

    async def get(self, owner: str, response_id: str) -> Stored | None:
        """One response. Raises StoreDownError."""
        return await self._look(owner, response_id, lambda store: store.get(owner, response_id))

    async def chain(self, owner: str, response_id: str, read: Callable[[list[Stored]], T]) -> T | None:
        """What ``read`` makes, in a thread, of a response and those before it; None where there is none.
        Raises StoreDownError, and whatever ``read`` raises."""

        def found(store: ResponseStore) -> T | None:
            chain = store.chain(owner, response_id)
            return read(chain) if chain else None

        return await self._look(owner, response_id, found)

    async def delete(self, owner: str, response_id: str) -> bool:
        """Whether there was one. Raises StoreDownError."""
        gone = await self._look(owner, response_id, lambda store: store.delete(owner, response_id) or None)
        return bool(gone)

    async def finish(self, owner: str, response_id: str, status: str, response: bytes) -> bool:
        """Write what has become of a response in the background; whether it was still under way. Raises
        StoreDownError."""
        return await self._call(lambda store: store.finish(owner, response_id, status, response))

    async def beat(self, runner: str, ids: list[tuple[str, str]]) -> set[tuple[str, str]]:
        """See ``ResponseStore.beat``. Raises StoreDownError."""
        return await self._call(lambda store: store.beat(runner, ids))

    async def silent(self, stored: Stored) -> bool:
        """See ``ResponseStore.silent``. Raises StoreDownError."""
        return await self._call(lambda store: store.silent(stored))

    async def tend(self) -> None:
        """From time to time: open the database, look whether it is back, and have what has expired not only
        not found, but gone. Raises StoreDownError."""
        if self._store is None or self._down:
            await self._ask(lambda store: store.ping())
        elif time.monotonic() - self._pruned_at > PRUNE_S:
            self._pruned_at = time.monotonic()
            await self._call(lambda store: store.prune())

    async def close(self) -> None:
        """Write what is left, for a moment. Whoever asks afterwards finds the store down."""
        if self._writes:
            await asyncio.wait(list(self._writes.values()), timeout=TIMEOUT_S)
        self._closed = True
        store, self._store = self._store, None
        if store is not None:
            with contextlib.suppress(TimeoutError):
                await self._in_thread(store.close)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _look(
        self, owner: str, response_id: str, work: Callable[[ResponseStore], T | None]
    ) -> T | None:
        """Read what may just be being written, here or elsewhere."""
        if (writing := self._writes.get((owner, response_id))) is not None:
            await asyncio.wait([writing])
        found = await self._call(work)
        if found is None and self._store is not None and self._store.shared:
            for wait_s in _LOOK_AGAIN_S:
                await asyncio.sleep(wait_s)
                if (found := await self._call(work)) is not None:
                    break
        return found

    async def _call(self, work: Callable[[ResponseStore], T]) -> T:
        if not self.usable:
            raise StoreDownError(_DOWN)
        return await self._ask(work)

    async def _ask(self, work: Callable[[ResponseStore], T]) -> T:
        if self._closed:
            raise StoreDownError(_DOWN, internal="the gateway is shutting down")
        try:
            store = await self._opened()
            result = await self._in_thread(lambda: work(store))
        except TimeoutError:
            why = f"responses.store: no answer within {TIMEOUT_S:g} s"
        except StoreError as error:
            why = str(error)
        else:
            self._set_down(None)
            return result
        self._set_down(why)
        raise StoreDownError(_DOWN, internal=why)

    def _set_down(self, why: str | None) -> None:
        if self._down == (why is not None):
            return
        self._down = why is not None
        log = logging.getLogger(EVENTS)
        if why is not None:
            log.error("responses are not kept for now: %s", why)
        else:
            log.info("responses are kept again")

    async def _opened(self) -> ResponseStore:
        if self._store is None:
            async with self._opening:
                if self._store is None:
                    url, settings, clock = self._url, self.settings, self._clock
                    self._store = await self._in_thread(lambda: ResponseStore(url, settings, clock))
                    self._store.limits = self.settings
        return self._store

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """A thread that hangs is not waited for, but goes on being counted. Raises TimeoutError."""
        work_done = self._threads.submit(work)
        future = asyncio.wrap_future(work_done)
        self._calls += 1
        future.add_done_callback(self._called)
        await asyncio.wait((future,), timeout=TIMEOUT_S)
        # Asked of the thread itself: the loop may have been kept from hearing of it in time.
        if not work_done.done():
            raise TimeoutError
        return work_done.result()

    def _called(self, future: asyncio.Future[T]) -> None:
        self._calls -= 1
        if not future.cancelled():
            future.exception()  # of one that nobody waits for any more

    def dropped(self, reason: str) -> None:
        """Count a response that should have been kept."""
        self._metrics.responses_dropped.labels(reason).inc()


def owner_of(key: ApiKey | None) -> str:
    """Whose a response is: all keys' of one tenant. A key without a tenant is a tenant of its own: what it
    kept is no other key's to read."""
    if key is None:
        return ""
    return f"tenant:{key.tenant}" if key.tenant else f"key:{key.name}"


def store_url(config: Config) -> str:
    """Where responses are kept. Raises ConfigError for a variable that is not set."""
    settings = config.responses
    given = configured_url("responses", settings.store, settings.store_env)
    if given is not None:
        return given
    return MEMORY if config.gateway.workers == 1 else f"sqlite:///{config.run_dir / 'responses.db'}"
