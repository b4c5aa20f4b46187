"""How fast an engine writes: all at a time, each prompt another, the median of the passes, several loads."""

import asyncio

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from quantize.core.energy import Meter
from quantize.evaluate import speed
from quantize.evaluate.client import EngineClient, EngineError


class Engine:
    """Takes ``seconds`` for each round of requests in turn, of which the last counts for all that follow."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds
        self.prompts: list[tuple[int, ...]] = []
        self.rounds: list[list[int]] = []
        """Per round the tokens that each of its requests asks for."""
        self.in_flight = 0

    async def complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert body["ignore_eos"], "an answer that ends early is no measure"
        if self.in_flight == 0:
            self.rounds.append([])
        self.in_flight += 1
        self.rounds[-1].append(body["max_tokens"])
        number = min(len(self.rounds), len(self.seconds)) - 1
        self.prompts.append(tuple(body["prompt"]))
        await asyncio.sleep(self.seconds[number])
        self.in_flight -= 1
        return web.json_response({"usage": {"completion_tokens": body["max_tokens"]}})


async def measured(engine: Engine, longest: int, meter: Meter | None = None) -> speed.Speed:
    app = web.Application()
    app.router.add_post("/v1/completions", engine.complete)
    async with TestServer(app) as server, EngineClient(str(server.make_url("")).rstrip("/"), "m") as client:
        return await speed.measure_speed(client, longest, meter)


async def test_speed_is_the_median_of_the_passes_after_the_first() -> None:
    engine = Engine([0.0, 0.2, 0.4, 0.1, 0.05])
    found = await measured(engine, 1024)
    usual = speed.USUAL
    assert found.together == usual.together
    assert len(engine.prompts) == len(set(engine.prompts))
    tokens = usual.together * usual.answer_tokens
    assert 0.5 * tokens / 0.2 < found.tokens_per_s <= tokens / 0.2, "the pass of 0.2 s is the median"
    assert found.slowest < found.tokens_per_s < found.fastest


async def test_prompts_and_steps_are_told_apart_at_every_load() -> None:
    passes = [0.1] * (1 + speed.PASSES)
    engine = Engine([*passes, 0.05, *[0.2, 0.1] * len(speed.OTHERS)])
    found = await measured(engine, 1024)
    loads = [(one.together, one.prompt_tokens, one.answer_tokens) for one in found.points]
    assert loads == [(o.together, o.prompt_tokens, o.answer_tokens) for o in (speed.USUAL, *speed.OTHERS)]
    rounds = [(len(asked), asked[0]) for asked in engine.rounds[1 + speed.PASSES :]]
    assert rounds[0] == (speed.USUAL.together, 1)
    assert rounds[1:3] == [(speed.OTHERS[0].together, speed.OTHERS[0].answer_tokens), (1, 1)]
    for point in found.points:
        whole = point.prompt_s + point.step_s * (point.answer_tokens - 1)
        assert point.prompt_s < whole
        assert whole >= 0.1


async def test_a_load_that_the_context_does_not_hold_is_left_out() -> None:
    found = await measured(Engine([0.0]), 256)
    assert max(one.prompt_tokens for one in found.points) < 256
    assert len(found.points) == 3


async def test_a_classifier_is_measured_by_labels_per_second_and_by_texts_that_it_takes() -> None:
    engine, app = Engine([0.0, 0.1]), web.Application()
    app.router.add_post("/v1/completions", engine.complete)
    async with TestServer(app) as server, EngineClient(str(server.make_url("")).rstrip("/"), "m") as client:
        found = await speed.measure_labels(client, 64)
    assert {tokens for asked in engine.rounds for tokens in asked} == {1}
    assert max(map(len, engine.prompts)) == 64 - speed.AROUND
    assert 0.5 * speed.USUAL.together / 0.1 < found.tokens_per_s <= speed.USUAL.together / 0.1
    assert [one.together for one in found.points] == [one.together for one in (speed.USUAL, *speed.OTHERS)]
    assert all(one.step_s < 1e-6 < one.prompt_s for one in found.points)


async def test_an_engine_that_cannot_write_says_so() -> None:
    async with TestServer(web.Application()) as server:
        client = EngineClient(str(server.make_url("")).rstrip("/"), "m")
        with pytest.raises(EngineError, match="answered 404"):
            async with client:
                await speed.measure_speed(client, 1024)
