"""How fast an engine writes: all at a time, each prompt another, the median of the passes."""

import asyncio

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from quantize.evaluate import speed
from quantize.evaluate.client import EngineClient, EngineError


class Engine:
    """Takes ``seconds`` for each pass of eight requests in turn."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds
        self.prompts: list[tuple[int, ...]] = []
        self.in_flight = self.most = 0

    async def complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert body["ignore_eos"], "an answer that ends early is no measure"
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        number = len(self.prompts) // speed.TOGETHER
        self.prompts.append(tuple(body["prompt"]))
        await asyncio.sleep(self.seconds[number])
        self.in_flight -= 1
        return web.json_response({"usage": {"completion_tokens": body["max_tokens"]}})


async def test_speed() -> None:
    engine = Engine([0.0, 0.2, 0.4, 0.1])
    app = web.Application()
    app.router.add_post("/v1/completions", engine.complete)
    async with TestServer(app) as server, EngineClient(str(server.make_url("")).rstrip("/"), "m") as client:
        found = await speed.measure_speed(client)
    assert engine.most == found.together == speed.TOGETHER
    assert len(engine.prompts) == len(set(engine.prompts)) == speed.TOGETHER * (speed.PASSES + 1)
    assert {len(prompt) for prompt in engine.prompts} == {found.prompt_tokens}
    tokens = speed.TOGETHER * speed.ANSWER_TOKENS
    assert 0.5 * tokens / 0.2 < found.tokens_per_s <= tokens / 0.2, "the pass of 0.2 s is the median"
    assert found.slowest < found.tokens_per_s < found.fastest


async def test_an_engine_that_cannot_write_says_so() -> None:
    async with TestServer(web.Application()) as server:
        client = EngineClient(str(server.make_url("")).rstrip("/"), "m")
        with pytest.raises(EngineError, match="answered 404"):
            async with client:
                await speed.measure_speed(client)
