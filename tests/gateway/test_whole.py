"""What the gateway asks engines for on its own account is never read without bound, and costs it no time."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from gateway_stack import eventually
from prometheus_client import CollectorRegistry

from gateway.config import WatchSettings
from gateway.proxy.record import NO_USAGE
from gateway.quality import inquiry as asking
from gateway.quality.examiner import UnansweredError
from gateway.quality.inquiry import Inquiry
from gateway.routing.health import probe
from gateway.routing.replicas import Replica
from gateway.telemetry import engines
from gateway.telemetry.engines import EngineReader, parse_reading
from gateway.telemetry.metrics import Metrics
from gateway.upstream import settle
from gateway.upstream.settle import Settlement, Unreported
from gateway.upstream.whole import TooLongError, read_whole

MOST = 1 << 20
FAR_MORE = 64 * MOST
"""What an engine would send; what of it is under way when nobody reads on any more is a few megabytes."""


class Endless:
    """An engine whose every answer goes on for ever."""

    def __init__(self) -> None:
        self.sent = self.cut = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        try:
            await response.write(b'{"count": 7, "tokens": [1')
            while self.sent < FAR_MORE:
                await response.write(b",1" * 32_768)
                self.sent += 65_536
            await response.write(b"]}")
        except (ConnectionError, asyncio.CancelledError):
            self.cut += 1
            raise
        return response

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.answer)
        async with TestServer(app) as server:
            yield str(server.make_url("")).rstrip("/")


@pytest.fixture(autouse=True)
def less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle, "LONGEST_ANSWER_BYTES", MOST)
    monkeypatch.setattr(settle, "AGAIN_AFTER_S", ())
    monkeypatch.setattr(engines, "LONGEST_BYTES", MOST)
    monkeypatch.setattr(asking, "LONGEST_ANSWER", MOST)


async def test_no_answer_of_an_engine_is_read_without_end(tmp_path: Path) -> None:
    """A count of tokens, its figures, its health, its judgement."""
    engine, registry = Endless(), CollectorRegistry()
    metrics = Metrics(registry, ["core"])
    async with engine.serving() as url, aiohttp.ClientSession() as session:
        replica = Replica("assistant:int8", "assistant:int8-0", url, lambda: 0.0)
        await probe(session, replica)
        assert replica.reachable
        await EngineReader(session, metrics, tmp_path, lambda: 0.0)._read(replica, None)
        assert replica.reading.waiting is None
        inquiry = Inquiry(WatchSettings(), {}, cast(Any, None), metrics)
        inquiry._session = session
        with pytest.raises(UnansweredError):
            await inquiry._post(replica, "/v1/completions", b"{}")
        booked: list[Any] = []
        settlement = Settlement(metrics, lambda *entry: booked.append(entry))
        task = asyncio.create_task(settlement.run(session))
        body = b'{"messages": []}'
        path, labels = "/v1/chat/completions", ("assistant", "int8")
        settlement.report(Unreported("core", labels, None, url, path, (body,), NO_USAGE))
        await eventually(lambda: settlement.idle)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert booked == []
        failed = {"role": "core", "model": "assistant", "variant": "int8", "outcome": "failed"}
        assert registry.get_sample_value("tiercel_usage_settled_total", failed) == 1
        assert engine.sent < FAR_MORE


@pytest.mark.parametrize("coding", ["", "deflate"])
async def test_an_answer_of_as_many_bytes_is_read(coding: str) -> None:
    async def answer(_: web.Request) -> web.Response:
        raw = zlib.compress(b"x" * 1000) if coding else b"x" * 1000
        return web.Response(body=raw, headers={"content-encoding": coding} if coding else {})

    app = web.Application()
    app.router.add_get("/", answer)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        async with session.get(server.make_url("/")) as response:
            assert await read_whole(response, 1000) == b"x" * 1000
        async with session.get(server.make_url("/")) as response:
            with pytest.raises(TooLongError):
                await read_whole(response, 999)


def test_figures_of_any_length_hold_nobody_up() -> None:
    line = 'vllm:num_requests_waiting{engine="%d"} 1.0\n'
    ranks = [line % rank for rank in range(50_000)]
    assert parse_reading("".join(ranks[:200])).waiting == 200
    for said in ("".join(ranks), "other 1.0\n" * 50_000):
        began = perf_counter()
        parse_reading(said)
        assert perf_counter() - began < 0.25
