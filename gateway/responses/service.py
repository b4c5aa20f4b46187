"""The store as the event loop sees it: reads that are awaited, writes that nobody waits for.

All of the database's work is done in threads. One that fails or hangs is tried again once a second by
``tend`` alone: whoever needs it meanwhile gets a StoreDownError at once, and whoever does not goes on without
being kept.

Threads are taken in turns (``turns.py``). To wait for one is not to wait for the database, whose time begins
when a thread has the call; what is made of its answer afterwards is no fault of its either.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from gateway.config import Config, ResponsesSettings
from gateway.errors import GatewayError, OverloadedError, StoreDownError, TenantOverloadedError
from gateway.responses.conversation import ItemPage
from gateway.responses.store import ResponseStore, Stored
from gateway.responses.turns import Shares, Turn, Turns
from gateway.store.database import MEMORY, StoreError, configured_url
from gateway.telemetry.logs import EVENTS
from gateway.telemetry.metrics import Metrics

TIMEOUT_S = 5.0
"""For one answer of the database."""
TURN_S, WRITE_TURN_S = 5.0, 30.0
"""How long is waited for a thread: by what a client waits for, and by what is written."""
PRUNE_S = 60.0
MOST_READING = 512
"""Calls that clients wait for."""
MOST_WAITING = 512
MOST_WAITING_BYTES = 64 << 20
"""Of responses that wait to be written."""
PAGE_BYTES = 1 << 20
"""Of a conversation, read at a time where its beginning or its end may do."""
_LOOK_AGAIN_S = (0.05, 0.2)
"""Another process may still be writing what its client has just been given the id of."""
_THREADS = 4
_DOWN = "The store of responses cannot be used now; try again, or send the whole conversation as `input`."
_BUSY = "The store of responses has much to do now; try again."

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
        self._turns = Turns(1 if url == MEMORY else _THREADS, "responses")
        self._opening = asyncio.Lock()
        self._writes: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._reading = Shares(MOST_READING)
        self._writing, self._writing_bytes = Shares(MOST_WAITING), Shares(MOST_WAITING_BYTES)
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
        return not self._down

    def now(self) -> float:
        """Unix time."""
        return self._clock()

    def keep(self, stored: Stored) -> None:
        """Write it when the database can; count it as dropped if that cannot be."""
        owner, size = stored.owner, stored.size
        if size > self.settings.max_tenant_bytes:
            self.dropped("too_large")
        elif not self.usable:
            self.dropped("store_down")
        elif not self._writing.take(owner):
            self.dropped("busy")
        elif not self._writing_bytes.take(owner, size):
            self._writing.give_back(owner)
            self.dropped("busy")
        else:
            key = (owner, stored.id)
            before = self._writes.get(key)
            self._writes[key] = asyncio.get_running_loop().create_task(self._write(stored, before))

    async def _write(self, stored: Stored, before: asyncio.Task[None] | None) -> None:
        try:
            if before is not None:
                await before
            await self._put(stored, writes=True)
        except GatewayError as error:
            self.not_kept(error)
        finally:
            self._writing.give_back(stored.owner)
            self._writing_bytes.give_back(stored.owner, stored.size)
            if self._writes.get(key := (stored.owner, stored.id)) is asyncio.current_task():
                del self._writes[key]

    async def _put(self, stored: Stored, *, writes: bool) -> None:
        await self._call(stored.owner, lambda store: store.put(stored), writes=writes)
        self._metrics.responses_stored.labels().inc()

    # What follows raises StoreDownError, OverloadedError, and TenantOverloadedError where too much is asked
    # for one owner.

    async def put(self, stored: Stored) -> None:
        """Write it now."""
        with self._counted(stored.owner):
            await self._put(stored, writes=False)

    async def get(self, owner: str, response_id: str) -> Stored | None:
        """One response."""
        with self._counted(owner):
            return await self._look(owner, response_id, lambda store: store.get(owner, response_id))

    async def chain(self, owner: str, response_id: str, read: Callable[[list[Stored]], T]) -> T | None:
        """What ``read`` makes, in a thread, of a response and those before it; None where there is none.
        Raises whatever ``read`` raises as well."""
        with self._counted(owner):
            chain = await self._look(
                owner, response_id, lambda store: store.chain(owner, response_id) or None
            )
            return await self._make(owner, lambda: read(chain)) if chain is not None else None

    async def items(self, owner: str, response_id: str, page: ItemPage) -> bool:
        """Give ``page``, in a thread, what it needs of a response and those before it; whether there is such
        a response."""
        with self._counted(owner):
            links = await self._look(
                owner, response_id, lambda store: store.links(owner, response_id) or None
            )
            if links is None:
                return False
            for ids in _by_size(links[::-1] if page.newest_first else links):
                if await self._fill(owner, ids, page):
                    break
        return True

    async def _fill(self, owner: str, ids: Sequence[str], page: ItemPage) -> bool:
        some = await self._call(owner, lambda store: store.some(owner, ids))
        return await self._make(owner, lambda: page.take(some))

    async def delete(self, owner: str, response_id: str) -> bool:
        """Whether there was one."""
        with self._counted(owner):
            gone = await self._look(
                owner, response_id, lambda store: store.delete(owner, response_id) or None
            )
        return bool(gone)

    @contextlib.contextmanager
    def _counted(self, owner: str) -> Iterator[None]:
        """A call that a client waits for."""
        reading = self._reading
        if not reading.take(owner):
            if not reading.left:
                raise OverloadedError(_BUSY)
            raise TenantOverloadedError(
                f"{reading.taken[owner]} requests of this tenant wait for the store of responses already; "
                "wait for their answers"
            )
        try:
            yield
        finally:
            reading.give_back(owner)

    # in the background

    async def finish(self, owner: str, response_id: str, status: str, response: bytes) -> bool:
        """Write what has become of a response in the background; whether it was still under way. Raises
        StoreDownError and OverloadedError."""
        return await self._call(
            owner, lambda store: store.finish(owner, response_id, status, response), writes=True
        )

    async def beat(self, runner: str, ids: list[tuple[str, str]]) -> set[tuple[str, str]]:
        """See ``ResponseStore.beat``. Raises StoreDownError and OverloadedError."""
        return await self._call(None, lambda store: store.beat(runner, ids))

    def silent(self, stored: Stored) -> bool:
        """See ``ResponseStore.silent``; of a response that has been read."""
        return self._store is not None and self._store.silent(stored)

    async def tend(self) -> None:
        """From time to time: open the database, look whether it is back, and have what has expired not only
        not found, but gone. Raises StoreDownError and OverloadedError."""
        if self._store is None or self._down:
            await self._call(None, lambda store: store.ping(), tries=True)
        elif time.monotonic() - self._pruned_at > PRUNE_S:
            self._pruned_at = time.monotonic()
            await self._call(None, lambda store: store.prune())

    async def close(self) -> None:
        """Write what is left, for a moment. Whoever asks afterwards finds the store down."""
        if self._writes:
            await asyncio.wait(list(self._writes.values()), timeout=TIMEOUT_S)
        self._closed = True
        store, self._store = self._store, None
        if store is not None:
            turn = Turn(self._turns.threads)
            with contextlib.suppress(TimeoutError):
                await turn.within(TIMEOUT_S, store.close)
            turn.end()
        self._turns.threads.shutdown(wait=False, cancel_futures=True)

    async def _look(
        self, owner: str, response_id: str, work: Callable[[ResponseStore], T | None]
    ) -> T | None:
        """Read what may just be being written, here or elsewhere."""
        if (writing := self._writes.get((owner, response_id))) is not None:
            await asyncio.wait([writing], timeout=TURN_S)
            if not (writing.done() or self._down):
                raise OverloadedError(_BUSY)
        found = await self._call(owner, work)
        if found is None and self._store is not None and self._store.shared:
            for wait_s in _LOOK_AGAIN_S:
                await asyncio.sleep(wait_s)
                if (found := await self._call(owner, work)) is not None:
                    break
        return found

    async def _call(
        self,
        owner: str | None,
        work: Callable[[ResponseStore], T],
        *,
        writes: bool = False,
        tries: bool = False,
    ) -> T:
        """What the database gives. ``owner``: None for what is everybody's. ``tries``: also while it is
        down."""
        self._refuse(tries=tries)
        turn = await self._turn(owner, WRITE_TURN_S if writes else TURN_S)
        try:
            self._refuse(tries=tries)  # it may be down by now
            store = await self._opened(turn, tries=tries)
            result = await turn.within(TIMEOUT_S, lambda: work(store))
        except TimeoutError:
            why = f"responses.store: no answer within {TIMEOUT_S:g} s"
        except StoreError as error:
            why = str(error)
        else:
            self._set_down(None)
            return result
        finally:
            turn.end()
        self._set_down(why)
        raise StoreDownError(_DOWN, internal=why)

    async def _make(self, owner: str, work: Callable[[], T]) -> T:
        """In a thread, and however long that takes."""
        turn = await self._turn(owner, TURN_S)
        try:
            self._refuse(tries=True)
            return await turn.do(work)
        finally:
            turn.end()

    def _refuse(self, *, tries: bool) -> None:
        if self._closed:
            raise StoreDownError(_DOWN, internal="the gateway is shutting down")
        if self._down and not tries:
            raise StoreDownError(_DOWN)

    async def _turn(self, owner: str | None, wait_s: float) -> Turn:
        """Raises OverloadedError, or StoreDownError where it is the database that all wait for."""
        try:
            return await self._turns.wait(owner, wait_s)
        except TimeoutError:
            raise (StoreDownError(_DOWN) if self._down else OverloadedError(_BUSY)) from None

    def _set_down(self, why: str | None) -> None:
        if self._down == (why is not None):
            return
        self._down = why is not None
        log = logging.getLogger(EVENTS)
        if why is not None:
            log.error("responses are not kept for now: %s", why)
        else:
            log.info("responses are kept again")

    async def _opened(self, turn: Turn, *, tries: bool) -> ResponseStore:
        if self._store is None:
            async with self._opening:
                if self._store is None:
                    self._refuse(tries=tries)  # another one may have tried meanwhile
                    url, settings, clock = self._url, self.settings, self._clock
                    self._store = await turn.within(TIMEOUT_S, lambda: ResponseStore(url, settings, clock))
                    self._store.limits = self.settings
        return self._store

    def not_kept(self, error: GatewayError) -> None:
        """Count a response that could not be written."""
        self.dropped("store_down" if isinstance(error, StoreDownError) else "busy")

    def dropped(self, reason: str) -> None:
        """Count a response that should have been kept."""
        self._metrics.responses_dropped.labels(reason).inc()


def _by_size(links: Iterable[tuple[str, int]]) -> Iterator[list[str]]:
    """Ids, so many together as have ``PAGE_BYTES``, and one at least."""
    ids: list[str] = []
    size = 0
    for name, more in links:
        if ids and size + more > PAGE_BYTES:
            yield ids
            ids, size = [], 0
        ids.append(name)
        size += more
    if ids:
        yield ids


def store_url(config: Config) -> str:
    """Where responses are kept. Raises ConfigError for a variable that is not set."""
    settings = config.responses
    given = configured_url("responses", settings.store, settings.store_env)
    if given is not None:
        return given
    return MEMORY if config.gateway.workers == 1 else f"sqlite:///{config.run_dir / 'responses.db'}"
