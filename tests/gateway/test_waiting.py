"""Whoever came first is served first, and nobody waits for ever."""

from __future__ import annotations

import asyncio

import pytest
from exchanges import Client, Clock, Driver, exchange

from gateway.errors import NoReplicaError
from gateway.proxy.exchange import Exchange
from gateway.proxy.waiting import LineKey, WaitingLines

KEY: LineKey = ("core", "assistant", ())


class Full:
    """No replica is free until one is."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.lines = WaitingLines(self.clock)
        self.free = 0
        self.may_wait = True
        self.served: list[Exchange] = []
        self.tried: list[Exchange] = []

    def attempt(self, one: Exchange) -> None:
        self.tried.append(one)
        if not self.free:
            raise NoReplicaError("full", may_wait=self.may_wait)
        self.free -= 1
        self.served.append(one)

    def wait(self, seconds: float = 60.0, key: LineKey = KEY) -> tuple[Exchange, asyncio.Task[None]]:
        one = exchange(Client(), Driver())
        waiting = self.lines.wait(key, one, self.clock.now + seconds, self.attempt)
        return one, asyncio.create_task(waiting)


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_the_first_in_line_alone_tries_and_is_served_first() -> None:
    full = Full()
    asked = [full.wait() for _ in range(3)]
    await settled()
    assert set(map(id, full.tried)) == {id(asked[0][0])}
    assert (len(full.lines), full.lines.waits(KEY)) == (3, True)
    for number in range(1, 4):
        full.free = 1
        full.lines.wake()
        await settled()
        assert full.served == [one for one, _ in asked[:number]]
    await asyncio.gather(*(task for _, task in asked))
    assert not full.lines.waits(KEY)


async def test_who_leaves_lets_the_next_one_try() -> None:
    full = Full()
    (_, first), (second, task) = full.wait(), full.wait()
    await settled()
    full.free = 1
    first.cancel()
    await task
    assert full.served == [second]
    assert not full.lines.lines


async def test_who_waits_is_refused_at_once_where_a_pool_comes_up_that_nobody_may_wait_for() -> None:
    full = Full()
    full.may_wait = False
    (_, first), (_, second) = full.wait(), full.wait()
    for waiting in (first, second):
        with pytest.raises(NoReplicaError, match="full"):
            await waiting
    assert not full.lines.lines


async def test_whose_time_is_over_is_refused_and_says_for_what_it_waited() -> None:
    full = Full()
    (_, first), (_, second) = full.wait(1000.0), full.wait(5.0)
    await settled()
    full.clock.now += 6.0
    with pytest.raises(NoReplicaError, match="Requests that came before"):
        await second
    full.clock.now += 1000.0
    with pytest.raises(NoReplicaError, match="full"):
        await first
    assert not full.lines.lines


async def test_lines_of_others_are_their_own() -> None:
    full = Full()
    (_, first), (_, other) = full.wait(), full.wait(key=("core", "assistant", ("assistant:int8",)))
    await settled()
    full.free = 2
    full.lines.wake()
    await asyncio.gather(first, other)
    assert len(full.served) == 2
