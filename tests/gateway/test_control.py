"""Background jobs that fail and go on, and reloads that change all or nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvicorn
from gateway_stack import (
    CHAT,
    OTHERS,
    Stack,
    addresses,
    eventually,
    make_config,
    running_gateway,
    settings,
    write_variants,
)
from prometheus_client import CollectorRegistry

from gateway import control
from gateway.api.overview import Overview
from gateway.app import Gateway
from gateway.config import ConfigError
from gateway.control import Heartbeat, Reloads, Supervisor
from gateway.kept.keeper import Keeper
from gateway.proxy.plane import DataPlane
from gateway.quality.inquiry import Inquiry
from gateway.quality.observe import Observer
from gateway.quality.process import CheckProcess
from gateway.quality.watch import Watch
from gateway.responses.service import Responses
from gateway.routing.discovery import Discovery
from gateway.server import Server
from gateway.telemetry.engines import EngineReader
from gateway.telemetry.metrics import Metrics
from gateway.upstream.fake import FakeEngine, Script
from gateway.upstream.settle import Settlement

JOBS: dict[str, tuple[Any, str]] = {
    "watch": (Watch, "run"),
    "watch_events": (Watch, "post_forever"),
    "inquiry": (Inquiry, "run"),
    "kept": (Keeper, "run"),
    "checks": (CheckProcess, "run"),
    "escalation": (CheckProcess, "run"),
    "heartbeat": (Heartbeat, "run"),
    "sweep": (DataPlane, "sweep_forever"),
    "probes": ("gateway.routing.health", "probe"),
    "scrapes": (EngineReader, "_read"),
    "responses": (Responses, "tend"),
    "settlement": (Settlement, "_work_off"),
    "overview": (Overview, "sample"),
    "discovery": (Discovery, "look"),
}
"""Every job of a gateway, and something that it calls."""


class Failing:
    """Stands for a coroutine function and fails the first times that it is called for a job; objects that
    have a name are jobs of their own."""

    def __init__(self, original: Any, times: int, job: str) -> None:
        self._original = original
        self._times = times
        self._job = job
        self.calls = 0

    def __get__(self, instance: Any, _: Any = None) -> Any:
        return lambda *given, **named: self(instance, *given, **named)

    async def __call__(self, *given: Any, **named: Any) -> Any:
        if given and getattr(given[0], "name", self._job) != self._job:
            return await self._original(*given, **named)
        self.calls += 1
        if self.calls <= self._times:
            raise RuntimeError(f"failure {self.calls} was injected")
        return await self._original(*given, **named)


@pytest.mark.parametrize("job", JOBS)
async def test_every_job_goes_on_after_a_failure(
    job: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gateway.app.INTERVAL_S", 0.05)
    monkeypatch.setattr("gateway.api.overview.INTERVAL_S", 0.05)
    place, name = JOBS[job]
    module = sys.modules[place] if isinstance(place, str) else place
    failing = Failing(getattr(module, name), times=2, job=job)
    monkeypatch.setattr(module, name, failing)
    async with running_gateway() as stack:
        await eventually(lambda: failing.calls > 2)
        restarted = "tiercel_background_job_restarts_total"
        await eventually(lambda: stack.sample(restarted, task=job) >= 1)
        await eventually(lambda: stack.sample("tiercel_background_job_up", task=job) == 1)
        restarts = stack.sample("tiercel_background_job_restarts_total", task=job)
        assert restarts >= 1
        told = [record for record in caplog.records if f"background job {job} failed" in record.message]
        assert len(told) == restarts
        assert all(record.exc_info for record in told)
        async with stack.post() as response:
            assert response.status == 200
        others = set(JOBS) - {job}
        assert all(stack.sample("tiercel_background_job_restarts_total", task=one) == 0 for one in others)


async def test_the_list_of_jobs_is_whole() -> None:
    async with running_gateway() as stack:
        assert set(JOBS) == {labels[0] for labels in stack.gateway.metrics.job_up.children}
        await eventually(lambda: stack.sample("tiercel_event_loop_lag_seconds_count") > 1)


async def test_what_an_inquiry_raises_ends_no_other() -> None:
    async with running_gateway() as stack:
        done: list[int] = []

        async def fails() -> None:
            raise KeyError("a provider that a reload has removed")

        async def works() -> None:
            done.append(1)

        for _ in range(4):
            stack.gateway._inquiry.offer(fails)
        await eventually(lambda: stack.gateway._inquiry.idle)
        stack.gateway._inquiry.offer(works)
        await eventually(lambda: done)


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> tuple[Supervisor, Metrics]:
    metrics = Metrics(CollectorRegistry(), ())
    return Supervisor(metrics, first_back_off_s=0.01), metrics


async def test_a_back_off_doubles_and_begins_anew_when_a_job_ran_well(
    supervised: tuple[Supervisor, Metrics], monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor, metrics = supervised
    waits: list[float] = []
    now = 0.0

    class Time:
        monotonic = staticmethod(lambda: now)

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await original(0)

    original = asyncio.sleep
    monkeypatch.setattr(control, "time", Time)
    monkeypatch.setattr(control.asyncio, "sleep", sleep)
    runs = 0

    async def job() -> None:
        nonlocal runs, now
        runs += 1
        if runs == 16:
            now += 10_000  # seconds in which it ran well
        if runs > 18:
            await asyncio.Event().wait()
        raise ValueError("no")

    supervisor.keep("job", job)
    while runs <= 18:
        await original(0)
    assert waits[:4] == [0.01, 0.02, 0.04, 0.08]
    assert max(waits) == control.LONGEST_BACK_OFF_S
    assert waits[15:18] == [0.01, 0.02, 0.04]
    assert metrics.job_restarts.labels("job").value == 18
    monkeypatch.undo()
    await supervisor.stop()


async def test_a_job_that_ends_or_is_cut_off_begins_anew(supervised: tuple[Supervisor, Metrics]) -> None:
    supervisor, metrics = supervised
    runs = 0

    async def job() -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            return
        if runs == 2:
            raise asyncio.CancelledError  # of something that it waited for
        await asyncio.Event().wait()

    supervisor.keep("job", job)
    await eventually(lambda: runs == 3)
    assert metrics.job_up.labels("job").value == 1
    await supervisor.stop()
    assert metrics.job_up.labels("job").value == 0


async def test_jobs_end_in_order_and_in_time(supervised: tuple[Supervisor, Metrics]) -> None:
    supervisor, _ = supervised
    ended: list[str] = []
    release = asyncio.Event()

    def job(name: str, *, stubborn: bool = False) -> Callable[[], Any]:
        async def run() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                while stubborn and not release.is_set():
                    with contextlib.suppress(asyncio.CancelledError):
                        await release.wait()
                ended.append(name)

        return run

    supervisor.keep("store", job("store"))
    supervisor.keep("stubborn", job("stubborn", stubborn=True))
    supervisor.keep("reader", job("reader"))
    await asyncio.sleep(0)
    async with asyncio.timeout(25):
        await supervisor.stop(within_s=0.3)
    assert ended[0] == "reader", "what began last ends first"
    assert "stubborn" not in ended
    release.set()
    await eventually(lambda: set(ended) == {"reader", "store", "stubborn"})


# reloads


async def put(stack: Stack, text: str) -> tuple[int, Any]:
    headers = {"content-type": "application/yaml"}
    async with stack.http.put(stack.url + "/admin/config", data=text, headers=headers) as response:
        return response.status, await response.json()


class Held:
    """Stands for ``gateway.app.Observer``, which a new configuration needs: waits until it may go on,
    or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = 0
        self.waiting = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.fails = False
        self.threads: set[int] = set()

        def make(*given: Any) -> Any:
            self.made += 1
            self.threads.add(threading.get_ident())
            self.waiting.set()
            assert self.may_go_on.wait(30)
            if self.fails:
                raise ConfigError("it was not to be")
            return Observer(*given)

        monkeypatch.setattr("gateway.app.Observer", make)


def state_of(gateway: Gateway) -> list[Any]:
    """What a reload may change."""
    watch = gateway.watch
    assert watch is not None
    weights = {labels: one.value for labels, one in gateway.metrics.weight_bytes.children.items()}
    return [
        gateway.plane.snapshot,
        gateway._inquiry.settings,
        gateway._inquiry.references,
        gateway.providers._providers,
        watch._watched,
        gateway.metrics.role("boss"),
        weights,
    ]


async def test_until_it_is_committed_a_reload_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_variants(tmp_path)
    held = Held(monkeypatch)
    async with running_gateway() as stack:
        config = stack.gateway.plane.snapshot.config
        urls = {variant: list(config.replicas(variant)) for variant in config.served}
        new = settings(
            tmp_path,
            {"bf16": urls["assistant:bf16"], "int8": urls["assistant:int8"]},
            serve=["bf16", "int8"],
            roles={"boss": {}},
            default_role="boss",
            watch={"store": "sqlite://", "rate": 1.0},
            providers=[{"model": "far", "litellm_model": "openai/far"}],
            gateway={"port": config.gateway.port},
            run_dir=str(config.run_dir.absolute()),
            quality={"detector": "lexical"},
        )
        new = new.replace(str(config.run_dir.absolute()), str(config.run_dir))
        before = state_of(stack.gateway)
        held.fails = True
        status, said = await put(stack, new)
        assert (status, "it was not to be" in said["error"]["message"]) == (400, True), said
        assert state_of(stack.gateway) == before, "a refused one leaves no trace"
        held.fails = False
        held.may_go_on.clear()
        held.waiting.clear()
        putting = asyncio.ensure_future(put(stack, new))
        await eventually(held.waiting.is_set)
        async with stack.post() as response:
            assert response.status == 200, "requests go on while it is built"
            assert response.headers["x-tiercel-variant"] == "assistant:bf16"
        assert state_of(stack.gateway) == before
        held.may_go_on.set()
        assert (await putting)[0] == 200
        now = state_of(stack.gateway)
        same = {"assistant": "assistant:bf16"}  # the models' references
        assert all(one != old for one, old in zip(now, before, strict=True) if one != same)
        assert threading.main_thread().ident in held.threads, "at the start"
        assert len(held.threads) > 1, "and in a thread from then on"


async def test_reloads_come_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    building, most = 0, 0

    def build(config: Any, cards: Any) -> Callable[[], None]:
        nonlocal building, most
        building += 1
        most = max(most, building)
        time.sleep(0.02)
        building -= 1
        return lambda: committed.append(config)

    committed: list[Any] = []
    reloads = Reloads(build, lambda text: (text, {}))  # type: ignore[return-value,arg-type]
    await asyncio.gather(*(reloads.replace(str(n)) for n in range(5)))
    assert most == 1
    assert committed == ["0", "1", "2", "3", "4"]
    await reloads.prepare("prepared")
    later = asyncio.ensure_future(reloads.replace("later"))
    await asyncio.sleep(0.05)
    assert not later.done()
    reloads.commit()
    await later
    assert committed[5:] == ["prepared", "later"]
    await reloads.prepare("dropped")
    reloads.drop()
    reloads.commit()
    assert committed[7:] == []

    def refuse(config: Any, cards: Any) -> Callable[[], None]:
        raise ConfigError("no")

    reloads._build = refuse
    with pytest.raises(ConfigError):
        await reloads.prepare("refused")
    with pytest.raises(ConfigError):
        await asyncio.wait_for(reloads.replace("refused"), 25)


async def test_what_cannot_change_is_refused_by_its_name() -> None:
    async with running_gateway() as stack:
        gateway, snapshot = stack.gateway, stack.gateway.plane.snapshot
        for changes, says in (
            ({"gateway": {"workers": 3}}, "gateway.workers: cannot change"),
            ({"watch": {"in_flight": 7}}, "watch.in_flight: cannot change"),
            ({"run_dir": Path("elsewhere")}, "run_dir: cannot change"),
        ):
            with pytest.raises(ConfigError, match=says):
                gateway.build(make_config(pools=snapshot.config.pools, **changes), snapshot.cards)
        assert gateway.plane.snapshot is snapshot


async def test_an_interval_that_a_reload_changes_is_kept_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_gateway(gateway={"health_interval_s": 3600}) as stack:
        gateway, snapshot = stack.gateway, stack.gateway.plane.snapshot
        probed = 0

        async def probe(*_: Any) -> None:
            nonlocal probed
            probed += 1

        monkeypatch.setattr("gateway.routing.health.probe", probe)
        quick = make_config(pools=snapshot.config.pools, gateway={"health_interval_s": 0.05})
        await gateway.reloads.apply(lambda: (quick, snapshot.cards))
        await eventually(lambda: probed > 3)


# names that are looked up


def names(stack: Stack) -> list[str]:
    return [
        replica.url for replica in stack.gateway.plane.snapshot.pools.by_variant["assistant:bf16"].replicas
    ]


async def test_a_reload_during_a_look_up_does_not_lose_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.app.INTERVAL_S", 0.05)
    looking, may_go_on = asyncio.Event(), asyncio.Event()

    async def resolver(host: str, port: int) -> list[str]:
        looking.set()
        await may_go_on.wait()
        return ["127.0.0.2"]

    pools = {"bf16": ("dns+http://engines.test:9",)}
    async with running_gateway(pools=pools, discovery=Discovery(resolver)) as stack:
        await looking.wait()
        snapshot = stack.gateway.plane.snapshot
        await stack.gateway.reloads.apply(lambda: (make_config(pools=pools), snapshot.cards))
        assert stack.gateway.plane.snapshot is not snapshot
        may_go_on.set()
        await eventually(lambda: names(stack) == ["http://127.0.0.2:9"])


async def test_addresses_that_change_during_a_reload_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.app.INTERVAL_S", 0.05)
    held = Held(monkeypatch)
    addresses, looks = ["127.0.0.2"], 0

    async def resolver(host: str, port: int) -> list[str]:
        nonlocal looks
        looks += 1
        return list(addresses)

    pools = {"bf16": ("dns+http://engines.test:9",)}
    async with running_gateway(pools=pools, discovery=Discovery(resolver)) as stack:
        await eventually(lambda: names(stack) == ["http://127.0.0.2:9"])
        snapshot = stack.gateway.plane.snapshot
        held.may_go_on.clear()
        held.waiting.clear()
        new = make_config(pools=pools, quality={"detector": "lexical"})
        reloading = asyncio.ensure_future(stack.gateway.reloads.apply(lambda: (new, snapshot.cards)))
        await eventually(held.waiting.is_set)
        addresses[:] = ["127.0.0.3"]
        seen = looks
        await eventually(lambda: looks > seen)
        held.may_go_on.set()
        await reloading
        assert stack.gateway.plane.snapshot.config is new
        await eventually(lambda: names(stack) == ["http://127.0.0.3:9"])
        assert stack.gateway.plane.snapshot.config is new


async def test_a_change_of_addresses_makes_nothing_else_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.app.INTERVAL_S", 0.05)
    held = Held(monkeypatch)
    addresses = ["127.0.0.2"]

    async def resolver(host: str, port: int) -> list[str]:
        return list(addresses)

    pools = {"bf16": ("dns+http://engines.test:9",)}
    async with running_gateway(pools=pools, discovery=Discovery(resolver)) as stack:
        await eventually(lambda: names(stack) == ["http://127.0.0.2:9"])
        before = stack.gateway.plane.snapshot
        watch = stack.gateway.watch
        assert watch is not None
        watched = watch._watched
        addresses[:] = ["127.0.0.3"]
        await eventually(lambda: names(stack) == ["http://127.0.0.3:9"])
        now = stack.gateway.plane.snapshot
        assert held.made == 1
        assert now.observer is before.observer
        assert watch._watched is watched


# signals


async def test_signals_are_events(tmp_path: Path, free_port: int) -> None:
    write_variants(tmp_path / "variants")
    engine = FakeEngine(Script(token_delay_s=0.3))
    async with engine.serving(also=OTHERS) as url:
        urls = addresses(url)
        path = tmp_path / "tiercel.yaml"
        gateway = {"port": free_port}
        text = settings(tmp_path / "variants", urls, gateway=gateway, run_dir=str(tmp_path))
        path.write_text(text)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway", "--config", str(path)), stderr=asyncio.subprocess.DEVNULL
        )
        base = f"http://127.0.0.1:{free_port}"
        async with aiohttp.ClientSession() as http:

            async def default_role() -> str | None:
                with contextlib.suppress(aiohttp.ClientError):
                    async with http.get(base + "/admin/config") as response:
                        return str((await response.json())["default_role"])
                return None

            async def has(role: str) -> bool:
                return await default_role() == role

            await eventually(lambda: has("core"), within_s=60)
            handled = int(_status(process.pid, "SigCgt"), 16)
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
                assert handled >> (number - 1) & 1
            path.write_text(text.replace("default_role: core", "default_role: summarizer"))
            for _ in range(20):  # in a burst, and while metrics are written
                process.send_signal(signal.SIGHUP)
                async with http.get(base + "/metrics") as response:
                    assert response.status == 200
            await eventually(lambda: has("summarizer"), within_s=30)
            question = {"model": "assistant", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
            async with http.post(base + CHAT, json=question) as response:
                await response.content.readany()
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGTERM)
                assert (await response.read()).endswith(b"data: [DONE]\n\n"), "what runs is finished"
        async with asyncio.timeout(30):
            assert await process.wait() == 0


def test_a_hangup_does_not_end_a_gateway_that_begins() -> None:
    """Whatever has changed its file may tell it so at once, and it takes a second to be there."""
    code = """
import runpy, signal, sys
class Look:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "gateway.app":
            print(signal.getsignal(signal.SIGHUP).name)
sys.meta_path.insert(0, Look)
sys.argv = ["gateway", "--config", "/none/tiercel.yaml"]
runpy.run_module("gateway", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("SIG_IGN\n", 2), done.stderr


async def test_what_a_gateway_begins_with_is_not_looked_through_for_garbage_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of it, providers' libraries too: each time that took 80 ms and more."""
    begun: list[str] = []

    async def startup(server: uvicorn.Server, sockets: object = None) -> None:
        begun.append("startup")

    async with running_gateway() as stack:
        monkeypatch.setattr(uvicorn.Server, "startup", startup)
        monkeypatch.setattr(gc, "collect", lambda: begun.append("collect"))
        monkeypatch.setattr(gc, "freeze", lambda: begun.append("freeze"))
        await Server(stack.gateway).startup()
        monkeypatch.undo()
    assert begun == ["collect", "startup", "freeze"]


def _status(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(name))


async def test_a_thread_that_does_not_end_does_not_keep_the_process(tmp_path: Path, free_port: int) -> None:
    """A look-up of a name can take minutes."""
    code = f"""
import asyncio, sys, threading, time
from gateway import server
from gateway.__main__ import main
from gateway.app import Gateway
server.LEFT_BEHIND_S = 0.5
original = Gateway._begin_jobs
def begin(self, session):
    asyncio.get_running_loop().run_in_executor(None, time.sleep, 600)
    return original(self, session)
Gateway._begin_jobs = begin
sys.exit(main(["--config", {str(tmp_path / "tiercel.yaml")!r}]))
"""
    write_variants(tmp_path / "variants")
    gateway = {"port": free_port, "shutdown_timeout_s": 1}
    text = settings(tmp_path / "variants", {}, gateway=gateway, run_dir=str(tmp_path))
    (tmp_path / "tiercel.yaml").write_text(text)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code), stderr=asyncio.subprocess.DEVNULL, env=dict(os.environ)
    )

    async def up() -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            url = f"http://127.0.0.1:{free_port}/health"
            async with aiohttp.ClientSession() as http, http.get(url) as response:
                return response.status == 200
        return False

    try:
        await eventually(up, within_s=60)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
