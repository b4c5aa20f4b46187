"""What `tiercel quantize` decides before it starts engines."""

import asyncio
import os

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from deploy.measuring import Turns, answering_at_once, speed_or_none
from gateway.config import load_config
from quantize.evaluate.client import EngineClient
from tests.deploy.test_supervisor import ROOT


@pytest.mark.parametrize(
    ("threads", "cores", "at_once"),
    [("1", 2, 2), ("1", 16, 2), ("2", 2, 1), ("8", 4, 1), (None, 8, 1), ("many", 8, 1), ("0", 8, 1)],
)
def test_engines_answer_side_by_side_only_with_threads_of_their_own(
    monkeypatch: pytest.MonkeyPatch, threads: str | None, cores: int, at_once: int
) -> None:
    config = load_config(ROOT / "tiercel.yaml")
    env = {} if threads is None else {"OMP_NUM_THREADS": threads}
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"env": env})})
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert answering_at_once(config) == at_once


async def test_an_engine_is_timed_while_no_other_answers() -> None:
    turns = Turns(2)
    now = {"beside": 0, "alone": 0}
    most = 0

    async def engine() -> None:
        nonlocal most
        async with turns.one():
            now["beside"] += 1
            most = max(most, now["beside"])
            assert not now["alone"]
            await asyncio.sleep(0.01)
            now["beside"] -= 1
        async with turns.alone():
            now["alone"] += 1
            assert now == {"beside": 0, "alone": 1}
            await asyncio.sleep(0.01)
            now["alone"] -= 1

    async with asyncio.timeout(60):
        await asyncio.gather(*(engine() for _ in range(6)))
    assert most == 2


async def test_an_engine_that_cannot_be_timed_stops_nothing() -> None:
    said: list[str] = []
    async with (
        TestServer(web.Application()) as server,
        EngineClient(str(server.make_url("")).rstrip("/"), "m") as client,
    ):
        assert await speed_or_none(client, "int8", said.append) is None
    assert "int8: its speed was not measured" in said[0]
    assert "answered 404" in said[0]


async def test_who_gives_up_waiting_to_be_alone_blocks_nobody() -> None:
    turns = Turns(2)

    async def alone() -> None:
        async with turns.alone():
            pass

    async with asyncio.timeout(60):
        async with turns.one():
            waiting = asyncio.create_task(alone())
            await asyncio.sleep(0.01)
            waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await alone()
        async with turns.one(), turns.one():
            pass
