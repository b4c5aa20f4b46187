"""A long run in a second: slopes of what grows, none of what does not, and probes that change."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
from aiohttp import web

from quantize.evaluate.client import EngineClient
from quantize.evaluate.soak import DRIFT, LOAD, PROBE_EVERY, Soak, slope, soak
from tests.quantize.scripted_engine import ScriptedEngine
from tests.quantize.test_measure import ask


class Writing(ScriptedEngine):
    async def _completions(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"usage": {"completion_tokens": body["max_tokens"]}})


def test_a_slope_is_found_with_its_interval_and_a_few_slow_rounds_do_not_move_it() -> None:
    flat = [(10.0 * i, 2.0 + 0.01 * (i * 7 % 5)) for i in range(60)]
    found = slope(flat)
    assert found is not None
    assert found.low <= 0 <= found.high
    assert not found.shows(DRIFT)
    disturbed = slope([(at, 20.0 if at in (100.0, 300.0) else value) for at, value in flat])
    assert disturbed is not None
    assert not disturbed.shows(DRIFT)
    growing = slope([(at, value + at / 1000) for at, value in flat])
    assert growing is not None
    assert growing.per_hour == pytest.approx(3.6, rel=0.1)
    assert growing.shows(DRIFT)
    assert slope(flat[:5]) is None


def test_a_night_of_rounds_takes_no_more_memory_than_an_hour() -> None:
    """Sen's slope is of all pairs: 100,000 rounds are 80 GB of them."""
    noise = random.Random(0)
    points = [(0.3 * at, 1.0 + 1e-6 * at + noise.gauss(0, 0.01)) for at in range(100_000)]
    found = slope(points)
    assert found is not None
    assert found.per_hour == pytest.approx(1e-6 / 0.3 * 3600, rel=0.05)
    assert found.low < found.per_hour < found.high


async def run(engine: ScriptedEngine, sizes: Iterator[int | None]) -> Soak:
    """Thirty rounds by a clock that goes on by itself, two seconds at each look."""
    clock = itertools.count(0.0, 2.0)
    async with engine.serve() as url, EngineClient(url, "assistant") as client:
        return await soak(
            client,
            [ask("one", "1"), ask("two", "2")],
            "m:int8",
            180,
            lambda: next(sizes),
            lambda: next(clock),
        )


async def test_a_leak_is_seen_and_steady_memory_is_not() -> None:
    leaking = await run(Writing(str.upper), itertools.count(1_000_000_000, 5_000_000))
    assert leaking.memory is not None
    assert leaking.memory.low > 0
    assert not leaking.well
    steady = await run(Writing(str.upper), itertools.cycle([1_000_000_000, 1_000_100_000]))
    assert steady.memory is not None
    assert not steady.memory.shows(0.0)
    assert steady.rounds >= PROBE_EVERY
    assert steady.tokens == steady.rounds * LOAD.together * LOAD.answer_tokens
    assert (steady.probes, steady.changed) == (2, 0)
    assert steady.passes >= 1


async def test_memory_that_cannot_be_read_is_not_told() -> None:
    assert (await run(Writing(str.upper), itertools.repeat(None))).memory is None


async def test_answers_that_change_are_counted() -> None:
    calls = itertools.count()
    found = await run(Writing(lambda text: f"{text} {next(calls) > 2}"), itertools.repeat(1))
    assert found.changed > 0
    assert not found.well
