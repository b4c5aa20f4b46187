"""A real engine that is stopped: it finishes what it has begun, within bounds, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from deploy.engine import EngineProcess, EngineSpec, free_port, port_in_use, running
from deploy.models import one_model
from gateway.config import load_config
from quantize.core.checkpoint import open_checkpoint
from quantize.registry import Registry
from tests.deploy.test_supervisor import ROOT

pytestmark = pytest.mark.engine
TOKENS = 900


def spec_of(directory: Path, **settings: object) -> EngineSpec:
    """The demo model's reference, to be served from ``directory``."""
    model = one_model(load_config(ROOT / "tiercel.yaml"))
    registry = Registry(directory, model.name, model.reference)
    card = registry.add_reference(open_checkpoint(model.path))
    # One token a chunk: a stream is under way when its first one has come.
    chosen = model.engine.model_copy(update={"extra_args": (), **settings})
    port = free_port(chosen.host)
    return EngineSpec(card, registry.path("bf16"), chosen, port, directory / "engine.log")


@asynccontextmanager
async def streaming(engine: EngineProcess) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The chunks of a long answer."""
    body = {"model": "assistant", "prompt": "go on", "max_tokens": TOKENS, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as http,
        http.post(engine.spec.url + "/v1/completions", json=body) as answer,
    ):
        assert answer.status == 200

        async def chunks() -> AsyncIterator[dict[str, Any]]:
            async for line in answer.content:
                data = line.decode().removeprefix("data: ").strip()
                if data and data != "[DONE]":
                    yield json.loads(data)

        yield chunks()


def family(engine: EngineProcess) -> list[psutil.Process]:
    assert engine.pid is not None
    process = psutil.Process(engine.pid)
    return [process, *process.children(recursive=True)]


def refuse_left(engine: EngineProcess, processes: list[psutil.Process]) -> None:
    """Nothing of a stopped engine runs, its port is free, and no file of it lies in the temporary folder."""
    _, left = psutil.wait_procs(processes, timeout=20)
    assert not [one for one in left if one.status() != psutil.STATUS_ZOMBIE]
    assert not port_in_use(engine.spec.settings.host, engine.spec.port)
    assert sockets_left() == []


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A temporary folder for this test alone; its path is short, for a socket's may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="t", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield


def sockets_left() -> list[Path]:
    return [path for path in Path(tempfile.gettempdir()).rglob("*") if path.is_socket()]


async def test_a_stream_that_is_under_way_is_finished(tmp_path: Path) -> None:
    async with running(spec_of(tmp_path, stop_timeout_s=60.0), print) as engine:
        processes = family(engine)
        assert len(processes) > 1
        assert sockets_left(), "they are where they are looked for"
        async with streaming(engine) as chunks:
            await anext(chunks)
            stopping = asyncio.create_task(engine.stop())
            rest = [chunk async for chunk in chunks]
        assert rest[-1]["usage"]["completion_tokens"] == TOKENS
        assert rest[-2]["choices"][0]["finish_reason"] == "length"
        await stopping
        assert engine.exit_code == 0
        refuse_left(engine, processes)


async def test_what_takes_longer_than_it_has_is_cut(tmp_path: Path) -> None:
    async with running(spec_of(tmp_path, stop_timeout_s=0.1), print) as engine:
        processes = family(engine)
        # A core that does nothing any more: it never ends what it has begun.
        async with streaming(engine) as chunks:
            await anext(chunks)
            for process in processes[1:]:
                process.suspend()
            await engine.stop()
        refuse_left(engine, processes)


async def test_one_that_is_still_loading_is_stopped(tmp_path: Path) -> None:
    engine = EngineProcess(spec_of(tmp_path))
    await engine.start()
    async with asyncio.timeout(120):
        while len(processes := family(engine)) < 2:
            await asyncio.sleep(0.05)
    await engine.stop()
    refuse_left(engine, processes)
