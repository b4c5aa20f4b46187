"""The way of a request: hops in their order, one end, and what comes after that."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from exchanges import Client, Clock, FakeAttempt, Trial, exchange

from gateway.errors import BadRequestError, ClientGoneError
from gateway.proxy.exchange import Exchange
from gateway.proxy.pipeline import OTHER, Pipeline
from gateway.proxy.record import Record
from gateway.proxy.reply import Reply


class Way:
    """A pipeline whose hops write down that they were there."""

    def __init__(self, *before: Any, after: tuple[Callable[[Record, Exchange], None], ...] = ()) -> None:
        self.went: list[str] = []
        self.records: list[Record] = []
        self.ended: list[Exchange] = []
        self.client = Client()
        self.pipeline = Pipeline(
            before=[*before, self.hop("last")],
            attempts=self,  # type: ignore[arg-type]
            reply=Reply(),
            after=(*after, lambda record, _: self.records.append(record)),
            known_models=frozenset(["assistant"]),
            clock=Clock(),
            ended=self.ended.append,
        )
        self.exchange = exchange(self.client, self.pipeline)

    def hop(self, name: str) -> Callable[[Exchange], None]:
        return lambda _: self.went.append(name)

    def begin(self, _: Exchange) -> None:
        self.went.append("attempts")

    async def done(self) -> None:
        while self.exchange.task is not None and not self.exchange.task.done():
            await asyncio.sleep(0)


async def test_hops_go_in_order_also_when_one_has_to_wait() -> None:
    waits = asyncio.Event()
    way = Way(lambda _: way.went.append("first"), lambda _: waits.wait())
    way.pipeline.start(way.exchange)
    await asyncio.sleep(0)
    assert way.went == ["first"]
    waits.set()
    await way.done()
    assert way.went == ["first", "last", "attempts"]


@pytest.mark.parametrize("waits", [False, True])
async def test_a_hop_that_refuses_ends_it_with_its_error(waits: bool) -> None:
    def refuse(_: Exchange) -> Any:
        if waits:
            return asyncio.to_thread(refuse_now)
        return refuse_now()

    def refuse_now() -> None:
        raise BadRequestError("n: is wrong; send a number", param="n")

    way = Way(refuse)
    way.pipeline.start(way.exchange)
    while not way.exchange.finished:
        await asyncio.sleep(0)
    assert way.went == []
    assert way.client.got[0][1].startswith(b"HTTP/1.1 400 ")
    assert [(record.status, record.error) for record in way.records] == [(400, "n: is wrong; send a number")]
    assert way.ended == [way.exchange]


@pytest.mark.parametrize("waits", [False, True])
async def test_a_defect_is_a_500_that_says_nothing_of_it(
    waits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def later() -> None:
        raise KeyError("secret")

    def fail(_: Exchange) -> Any:
        return later() if waits else {}["secret"]

    way = Way(fail)
    with caplog.at_level(logging.ERROR):
        way.pipeline.start(way.exchange)
        while not way.exchange.finished:
            await asyncio.sleep(0)
    assert way.client.got[0][1].startswith(b"HTTP/1.1 500 ")
    assert b"secret" not in way.client.got[0][1]
    assert "request failed" in caplog.text


def test_a_hop_after_that_fails_keeps_no_other_from_the_record(caplog: pytest.LogCaptureFixture) -> None:
    def fail(record: Record, _: Exchange) -> None:
        raise ValueError(record.model)

    way = Way(after=(fail,))
    way.exchange.model = "something else"
    way.pipeline.start(way.exchange)
    way.pipeline.finish(way.exchange)
    assert [record.model for record in way.records] == [OTHER]
    assert "a hop after a request failed" in caplog.text


def test_an_end_is_one_and_takes_what_is_under_way_with_it() -> None:
    way, trial = Way(), Trial()
    way.pipeline.start(way.exchange)
    attempt = FakeAttempt(way.exchange, trial.replicas[0])
    way.exchange.attempts = [attempt]
    way.pipeline.client_left(way.exchange)
    way.pipeline.client_left(way.exchange)
    way.pipeline.fail(way.exchange, BadRequestError("too late"))
    assert attempt.cancelled
    assert [record.status for record in way.records] == [ClientGoneError("").status]
    assert way.client.got == [], "nobody is there to be told"
    assert way.exchange.attempts == []


async def test_what_is_waited_for_ends_with_the_exchange() -> None:
    way = Way(lambda _: asyncio.Event().wait())
    way.pipeline.start(way.exchange)
    task = way.exchange.task
    assert task is not None
    await asyncio.sleep(0)
    way.pipeline.client_left(way.exchange)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert way.went == []
    assert len(way.records) == 1
