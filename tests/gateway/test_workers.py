"""Several processes on one port: their numbers add up, and their limits are one limit."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from gateway_stack import eventually, settings, write_variants

from gateway.upstream.fake import FakeEngine, Script
from gateway.workers import Board

QUESTION = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}


@asynccontextmanager
async def workers(directory: Path, port: int, url: str, **changes: Any) -> AsyncIterator[str]:
    """A gateway of two workers as a user starts it; gives its URL."""
    write_variants(directory / "variants")
    gateway = {"port": port, "workers": 2} | changes.pop("gateway", {})
    urls = {variant: [url] for variant in ("bf16", "int8", "int4-kv8")}
    path = directory / "tiercel.yaml"
    text = settings(directory / "variants", urls, gateway=gateway, run_dir=str(directory), **changes)
    path.write_text(text)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "--config", str(path), stderr=asyncio.subprocess.DEVNULL
    )
    base = f"http://127.0.0.1:{port}"

    async def ready() -> bool:
        sockets = list((directory / "workers").glob("*.sock"))
        if len(sockets) < 2:
            return False
        async with aiohttp.ClientSession() as http, http.get(base + "/readiness") as response:
            return response.status == 200

    try:
        await eventually(ready, within_s=60)
        yield base
    finally:
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            assert await process.wait() == 0


async def ask(url: str) -> int:
    """The status of a request over a connection of its own."""
    path = url + "/v1/chat/completions"
    async with aiohttp.ClientSession() as http, http.post(path, json=QUESTION) as response:
        await response.read()
        return response.status


async def metric(url: str, beginning: str) -> float:
    async with aiohttp.ClientSession() as http, http.get(url + "/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(beginning))


async def test_workers(tmp_path: Path, free_port: int) -> None:
    engine = FakeEngine(Script(first_token_delay_s=1.5))
    roles = {"intent_classifier": {}, "summarizer": {}, "core": {"when_full": "refuse"}}
    async with engine.serving() as engine_url:
        limits = {"gateway": {"max_in_flight": 3}, "roles": roles}
        async with workers(tmp_path, free_port, engine_url, **limits) as url:
            statuses = await asyncio.gather(*(ask(url) for _ in range(24)))
            assert statuses.count(200) == len(engine.requests)
            assert 3 <= statuses.count(200) <= 5, "about three at a time, whichever worker they came to"
            assert set(statuses) == {200, 503}
            for _ in range(5):
                assert await metric(url, "tiercel_requests_total") == 24
            assert await metric(url, 'tiercel_tokens_total{kind="completion"') == 4 * statuses.count(200)
            path = url + "/admin/config"
            async with aiohttp.ClientSession() as http, http.put(path, data="{}") as response:
                assert response.status == 400
                assert "SIGHUP" in await response.text()


def test_a_board_has_a_row_for_each_worker(tmp_path: Path) -> None:
    boards = [Board(tmp_path / "board", worker, 3) for worker in range(3)]
    slot = Board.slot("int8", "http://127.0.0.1:1")
    for worker, board in enumerate(boards):
        board.write(slot, worker + 1)
    assert [board.others(slot) for board in boards] == [5, 4, 3]
    again = Board(tmp_path / "board", 1, 3)
    assert boards[0].others(slot) == 3, "a worker that starts again has nothing in flight"
    for board in (*boards, again):
        board.close()
