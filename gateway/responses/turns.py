"""Threads for the calls of many owners: who waits has a turn, and nobody has all of them.

Of one owner's calls no more than half of the threads have one at a time, so that those of others come in
between.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")


class Shares:
    """What there is only so much of, and what each owner has of it: no more than is left for all others, so
    that there is always some for one who comes."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken: Counter[str] = Counter()

    @property
    def left(self) -> int:
        return self.most - self.taken.total()

    def take(self, owner: str, amount: int = 1) -> bool:
        """Whether there was enough."""
        if self.taken[owner] + amount > self.left:
            return False
        self.taken[owner] += amount
        return True

    def give_back(self, owner: str, amount: int = 1) -> None:
        self.taken[owner] -= amount
        if not self.taken[owner]:
            del self.taken[owner]


class Turns:
    """The threads."""

    def __init__(self, count: int, name: str) -> None:
        self.threads = ThreadPoolExecutor(count, name)
        self._free = asyncio.Semaphore(count)
        self._most_of_one = max(1, count // 2)
        self._free_for: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def wait(self, owner: str | None, wait_s: float) -> Turn:
        """A thread, after others have had theirs. ``owner``: None for what is everybody's. Raises
        TimeoutError."""
        places = [self._free]
        if owner is not None:
            own = self._free_for.get(owner)
            if own is None:
                own = self._free_for[owner] = asyncio.Semaphore(self._most_of_one)
            places.insert(0, own)
        turn = Turn(self.threads)
        try:
            async with asyncio.timeout(wait_s):
                for place in places:
                    await place.acquire()
                    turn.taken.append(place)
        except BaseException:
            turn.end()
            raise
        return turn


class Turn:
    """A thread for one call."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self.taken: list[asyncio.Semaphore] = []
        """What it gives back in the end."""
        self._threads = threads
        self._work: asyncio.Future[Any] | None = None

    async def within(self, timeout_s: float, work: Callable[[], T]) -> T:
        """What comes of ``work``; of a thread that hangs it is not waited for. Raises TimeoutError."""
        done, future = self._begin(work)
        await asyncio.wait((future,), timeout=timeout_s)
        # Asked of the thread itself: the loop may have been kept from hearing of it in time.
        if not done.done():
            raise TimeoutError
        return done.result()

    async def do(self, work: Callable[[], T]) -> T:
        """What comes of ``work``, however long it takes."""
        _, future = self._begin(work)
        return await asyncio.shield(future)

    def end(self) -> None:
        """The call is over, but for a thread that hangs: that one stays taken until it does not."""
        if self._work is None or self._work.done():
            self._give_back(self._work)
        else:
            self._work.add_done_callback(self._give_back)

    def _begin(self, work: Callable[[], T]) -> tuple[Future[T], asyncio.Future[T]]:
        done = self._threads.submit(work)
        self._work = future = asyncio.wrap_future(done)
        return done, future

    def _give_back(self, work: asyncio.Future[Any] | None) -> None:
        if work is not None and not work.cancelled():
            work.exception()  # nobody waits for it any more
        while self.taken:
            self.taken.pop().release()
