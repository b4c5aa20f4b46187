"""Several processes on one port: their numbers add up, their limits are one limit, and none of them ends
another."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from gateway_stack import OTHERS, addresses, eventually, from_clients, make_config, settings, write_variants
from prometheus_client import CollectorRegistry

from gateway.config import Config, ConfigError
from gateway.telemetry.metrics import Metrics
from gateway.upstream.fake import FakeEngine, Script
from gateway.workers import board as board_module
from gateway.workers import parent as parent_module
from gateway.workers.board import NO_SLOT, Board
from gateway.workers.parent import Parent
from gateway.workers.sheet import Sheet, Sheets

QUESTION = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}


class Running:
    """A gateway of several workers, as a user starts it."""

    def __init__(self, directory: Path, url: str, process: asyncio.subprocess.Process) -> None:
        self.url = url
        self.path = directory / "tiercel.yaml"
        self.process = process
        self.log = directory / "log"

    def workers(self) -> dict[int, psutil.Process]:
        """The processes that run, by worker."""
        found = {}
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.Error, ValueError, IndexError):
                    line = child.cmdline()
                    found[int(line[line.index("--worker") + 1])] = child
        return found

    def said(self, what: str) -> int:
        """How often the log says something."""
        return self.log.read_text().count(what)

    async def put(self, text: str) -> tuple[int, str]:
        headers = {"content-type": "application/yaml"}
        async with (
            aiohttp.ClientSession() as http,
            http.put(self.url + "/admin/config", data=text, headers=headers) as response,
        ):
            return response.status, await response.text()

    async def default_roles(self) -> set[str]:
        """Of the configurations that the workers use, looked at over connections of their own."""
        found = set()
        for _ in range(16):
            async with aiohttp.ClientSession() as http, http.get(self.url + "/admin/config") as response:
                found.add((await response.json())["default_role"])
        return found


@asynccontextmanager
async def running(directory: Path, port: int, url: str, **changes: Any) -> AsyncIterator[Running]:
    write_variants(directory / "variants")
    gateway = {"port": port, "workers": 2} | changes.pop("gateway", {})
    urls = addresses(url)
    path = directory / "tiercel.yaml"
    text = settings(directory / "variants", urls, gateway=gateway, run_dir=str(directory), **changes)
    path.write_text(text)
    with (directory / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway", "--config", str(path)), stderr=log
        )
    base = f"http://127.0.0.1:{port}"
    gateway_process = Running(directory, base, process)

    async def ready() -> bool:
        try:
            async with aiohttp.ClientSession() as http, http.get(base + "/readiness") as response:
                ok = response.status == 200
            return ok and len(await ages(base)) == gateway["workers"]
        except aiohttp.ClientError:
            return False

    try:
        await eventually(ready, within_s=180)
        yield gateway_process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(40):
            assert await process.wait() == 0


@asynccontextmanager
async def workers(directory: Path, port: int, url: str, **changes: Any) -> AsyncIterator[str]:
    """The same; gives its URL."""
    async with running(directory, port, url, **changes) as gateway:
        yield gateway.url


async def ask(url: str) -> int:
    """The status of a request over a connection of its own."""
    path = url + "/v1/chat/completions"
    async with aiohttp.ClientSession() as http, http.post(path, json=QUESTION) as response:
        await response.read()
        return response.status


async def metrics_of(url: str) -> list[str]:
    async with aiohttp.ClientSession() as http, http.get(url + "/metrics") as response:
        return (await response.text()).splitlines()


async def metric(url: str, beginning: str) -> float:
    lines = await metrics_of(url)
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(beginning))


async def ages(url: str) -> list[float]:
    """Seconds since each worker's heartbeat."""
    lines = await metrics_of(url)
    return [
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith("tiercel_worker_heartbeat_age_seconds{")
    ]


async def test_workers(tmp_path: Path, free_port: int) -> None:
    hold = asyncio.Event()
    engine = FakeEngine(Script(hold=hold))
    roles = {"intent_classifier": {}, "summarizer": {}, "core": {"when_full": "refuse"}}
    async with engine.serving(also=OTHERS) as engine_url:
        limits = {"gateway": {"max_in_flight": 3}, "roles": roles}
        async with workers(tmp_path, free_port, engine_url, **limits) as url:
            asked = [asyncio.create_task(ask(url)) for _ in range(24)]
            # Each is refused, or with the engine: none comes when another one has left.
            await eventually(lambda: sum(map(asyncio.Task.done, asked)) + len(from_clients(engine)) == 24)
            hold.set()
            statuses = await asyncio.gather(*asked)
            assert statuses.count(200) == len(from_clients(engine))
            assert 3 <= statuses.count(200) <= 5, "about three at a time, whichever worker they came to"
            assert set(statuses) == {200, 503}
            for _ in range(5):
                assert await metric(url, "tiercel_requests_total") == 24
            assert await metric(url, 'tiercel_tokens_total{kind="completion"') == 4 * statuses.count(200)


async def test_a_worker_that_is_killed_takes_no_count_with_it(tmp_path: Path, free_port: int) -> None:
    # Long enough for the clients to wait: where they take the cores, a worker starts the slower.
    engine = FakeEngine(Script(first_token_delay_s=0.05))
    async with (
        engine.serving(also=OTHERS) as engine_url,
        running(tmp_path, free_port, engine_url) as gateway,
    ):
        answered, stop = 0, False
        seen: list[float] = []

        async def client() -> None:
            nonlocal answered
            while not stop:
                try:
                    if await ask(gateway.url) == 200:
                        answered += 1
                except aiohttp.ClientError:
                    await asyncio.sleep(0.01)  # it was with the one that was killed

        async def look() -> None:
            while not stop:
                with contextlib.suppress(aiohttp.ClientError):
                    seen.append(await metric(gateway.url, "tiercel_requests_total"))
                await asyncio.sleep(0.05)  # a tenth of the shortest back-off

        async def restarted(times: int) -> bool:
            with contextlib.suppress(aiohttp.ClientError):
                return await metric(gateway.url, "tiercel_worker_restarts_total") == times
            return False

        tasks = [asyncio.create_task(one) for one in (*(client() for _ in range(4)), look())]
        for times, worker in enumerate((0, 1, 0), 1):
            enough = answered + 40
            await eventually(lambda enough=enough: answered >= enough, within_s=60)
            await eventually(lambda worker=worker: worker in gateway.workers(), within_s=60)
            old = gateway.workers()[worker]
            old.kill()
            await eventually(
                lambda worker=worker, old=old: gateway.workers().get(worker, old).pid != old.pid,
                within_s=60,
            )
            # One that is killed before it has begun has counted no start.
            await eventually(lambda times=times: restarted(times), within_s=60)
        enough = answered + 40
        await eventually(lambda: answered >= enough, within_s=60)
        stop = True
        await asyncio.gather(*tasks)
        assert seen == sorted(seen), "a total that falls would be traffic without end"
        # A request is counted when its answer has been written: at most those under way were not.
        total = await metric(gateway.url, 'tiercel_requests_total{model="assistant"')
        counted = len(from_clients(engine))
        assert answered - 3 * 4 <= total <= counted


async def test_a_worker_that_does_not_answer_is_counted_and_its_age_shown(
    tmp_path: Path, free_port: int
) -> None:
    engine = FakeEngine(Script())
    async with (
        engine.serving(also=OTHERS) as engine_url,
        running(tmp_path, free_port, engine_url) as gateway,
    ):
        for _ in range(12):
            assert await ask(gateway.url) == 200

        def counted(found: list[str]) -> float:
            lines = [one for one in found if one.startswith("tiercel_requests_total")]
            return sum(float(line.rpartition(" ")[2]) for line in lines)

        async def all_counted() -> bool:  # an answer is sent before it is counted
            return counted(await metrics_of(gateway.url)) == 12

        await eventually(all_counted)
        silent = gateway.workers()[0]
        silent.suspend()
        try:

            async def looked() -> list[str]:
                """The first answer over any of several connections: half of them the silent one is given."""
                while True:
                    looks = [asyncio.create_task(metrics_of(gateway.url)) for _ in range(6)]
                    try:
                        async with asyncio.timeout(3):
                            return await next(asyncio.as_completed(looks))
                    except (aiohttp.ClientError, TimeoutError):
                        continue
                    finally:
                        for look in looks:
                            look.cancel()
                        await asyncio.gather(*looks, return_exceptions=True)

            async def old() -> bool:
                lines = [one for one in await looked() if one.startswith("tiercel_worker_heartbeat")]
                return max(float(line.rpartition(" ")[2]) for line in lines) > 1

            await eventually(old, within_s=60)
            assert counted(await looked()) == 12
        finally:
            silent.resume()


async def test_a_mistake_in_the_file_stops_nobody(tmp_path: Path, free_port: int) -> None:
    engine = FakeEngine(Script())
    async with (
        engine.serving(also=OTHERS) as engine_url,
        running(tmp_path, free_port, engine_url) as gateway,
    ):
        good = gateway.path.read_text()
        gateway.path.write_text(good.replace("default_role: core", "default_role: boss"))
        gateway.process.send_signal(signal.SIGHUP)
        await eventually(lambda: gateway.said("the configuration was not changed"), within_s=30)
        before = gateway.workers()
        before[1].kill()
        await eventually(
            lambda: 1 in gateway.workers() and gateway.workers()[1].pid != before[1].pid, within_s=60
        )

        async def both() -> bool:
            with contextlib.suppress(aiohttp.ClientError):
                found = await ages(gateway.url)
                return len(found) == 2 and max(found) < 2
            return False

        await eventually(both, within_s=60)
        assert gateway.workers()[0].pid == before[0].pid, "the healthy one went on"
        assert gateway.said("with the configuration that was last accepted")
        assert await ask(gateway.url) == 200
        assert await gateway.default_roles() == {"core"}


async def test_a_new_configuration_reaches_all_workers_or_none(tmp_path: Path, free_port: int) -> None:
    engine = FakeEngine(Script())
    async with (
        engine.serving(also=OTHERS) as engine_url,
        running(tmp_path, free_port, engine_url) as gateway,
    ):
        good = gateway.path.read_text()
        summarizer = good.replace("default_role: core", "default_role: summarizer")
        status, said = await gateway.put(summarizer)
        assert status == 200, said
        assert await gateway.default_roles() == {"summarizer"}
        for text, says in (
            (good.replace("default_role: core", "default_role: boss"), "'boss' is not a role"),
            (good.replace("workers: 2", "workers: 3"), "cannot change while the gateway runs"),
            ("roles: [", "is not valid YAML"),
        ):
            status, said = await gateway.put(text)
            assert status == 400
            assert says in said
        assert await gateway.default_roles() == {"summarizer"}
        before = gateway.workers()[0]
        before.kill()
        await eventually(
            lambda: 0 in gateway.workers() and gateway.workers()[0].pid != before.pid, within_s=60
        )

        async def lively() -> bool:
            with contextlib.suppress(aiohttp.ClientError):
                return max(await ages(gateway.url)) < 1
            return False

        await eventually(lively, within_s=60)
        assert await gateway.default_roles() == {"summarizer"}, "who is started anew has it too"
        gateway.process.send_signal(signal.SIGHUP)
        await eventually(lambda: gateway.said("the configuration was read anew"), within_s=30)
        assert await gateway.default_roles() == {"core"}


async def test_a_worker_in_its_back_off_holds_up_no_end(tmp_path: Path, free_port: int) -> None:
    engine = FakeEngine(Script())
    async with (
        engine.serving(also=OTHERS) as engine_url,
        running(tmp_path, free_port, engine_url) as gateway,
    ):
        for number in range(1, 4):  # each back-off is twice the one before: 0.5, 1, 2 s
            await eventually(lambda: 0 in gateway.workers(), within_s=60)
            gateway.workers()[0].kill()
            await eventually(lambda n=number: gateway.said("worker 0 ended") == n, within_s=30)
        gateway.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(15):
            assert await gateway.process.wait() == 0
        assert gateway.said("worker 0 ended") == 3


async def test_workers_end_when_their_parent_is_gone(tmp_path: Path, free_port: int) -> None:
    engine = FakeEngine(Script())
    async with engine.serving(also=OTHERS) as engine_url:
        with contextlib.suppress(AssertionError):  # of its exit status
            async with running(tmp_path, free_port, engine_url) as gateway:
                children = list(gateway.workers().values())
                gateway.process.kill()
                await gateway.process.wait()
                await eventually(lambda: not any(map(_runs, children)), within_s=40)
        assert not any(map(_runs, children))


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("what", ["file", "classifier"])
async def test_at_the_first_start_a_bad_configuration_is_said_once(
    what: str, tmp_path: Path, free_port: int
) -> None:
    write_variants(tmp_path / "variants")
    changes: dict[str, Any] = {"default_role": "boss"}
    if what == "classifier":  # shows only in a worker
        changes = {"quality": {"detector": "classifier", "classifier": str(tmp_path / "nothing")}}
    gateway = {"port": free_port, "workers": 3}
    text = settings(tmp_path / "variants", {}, gateway=gateway, run_dir=str(tmp_path), **changes)
    (tmp_path / "tiercel.yaml").write_text(text)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "--config", str(tmp_path / "tiercel.yaml")),
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        _, said = await process.communicate()
    assert process.returncode == 2
    assert len(said.splitlines()) == 1, said.decode()


async def test_a_run_directory_has_one_gateway(tmp_path: Path, free_port: int) -> None:
    engine = FakeEngine(Script())
    async with (
        engine.serving(also=OTHERS) as engine_url,
        running(tmp_path, free_port, engine_url) as gateway,
    ):
        other = tmp_path / "other.yaml"
        other.write_text(gateway.path.read_text().replace(f"port: {free_port}", f"port: {free_port + 1}"))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway", "--config", str(other)), stderr=asyncio.subprocess.PIPE
        )
        _, said = await process.communicate()
        assert process.returncode == 2
        assert b"run_dir" in said
        assert await ask(gateway.url) == 200


def a_parent(directory: Path, **gateway: Any) -> Parent:
    """Of workers that do nothing but wait; texts are the default roles of its configurations."""

    def config_of(text: str, _: str) -> Config:
        return make_config(default_role=text, gateway={"workers": 2} | gateway, run_dir=directory)

    (directory / "workers").mkdir()
    path = directory / "tiercel.yaml"
    path.write_text("core")
    parent = Parent(config_of("core", ""), "core", path, config_of)
    parent._command = [sys.executable, "-c", "import time; time.sleep(600)"]
    return parent


@pytest.fixture
def default_signals() -> Iterator[None]:
    yield
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


async def test_of_many_hangups_the_last_one_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, default_signals: None
) -> None:
    """Of files that are read at the same time the older one may be taken over last."""
    parent = a_parent(tmp_path)
    taken: list[str] = []

    async def replace(text: str, _: str) -> None:
        await asyncio.sleep(0.05)
        taken.append(text)

    monkeypatch.setattr(parent, "replace", replace)
    running = asyncio.create_task(parent.run())
    await eventually(lambda: parent._tasks)  # it listens
    try:
        for number in range(100):
            (tmp_path / "next").write_text(str(number))
            (tmp_path / "next").rename(parent._path)
            signal.raise_signal(signal.SIGHUP)
            await asyncio.sleep(0.002)
        await eventually(lambda: taken[-1:] == ["99"])
        assert len(taken) < 20
        assert taken == sorted(taken, key=int)
    finally:
        parent._stopping.set()
        assert await running == 0


async def test_what_cannot_change_does_not_while_no_worker_is_there_either(tmp_path: Path) -> None:
    parent = a_parent(tmp_path)
    parent._check = lambda text, source: make_config(gateway={"workers": 3}, run_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"gateway\.workers: cannot change"):
        await parent.replace("core", "test")
    assert parent._config.gateway.workers == 2


async def test_a_worker_is_started_when_there_is_room_for_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, default_signals: None
) -> None:
    monkeypatch.setattr(parent_module, "FIRST_BACK_OFF_S", 0.05)
    start, failed = asyncio.create_subprocess_exec, 0

    async def full(*command: Any, **more: Any) -> asyncio.subprocess.Process:
        nonlocal failed
        failed += 1
        if failed < 3:
            raise BlockingIOError("Resource temporarily unavailable")
        return await start(*command, **more)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", full)
    parent = a_parent(tmp_path)
    running = asyncio.create_task(parent.run())
    await eventually(lambda: parent._workers[0].process is not None)
    parent._stopping.set()
    assert await asyncio.wait_for(running, 10) == 0
    assert failed == 3


async def test_a_worker_that_is_being_started_holds_up_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, default_signals: None
) -> None:
    start = asyncio.create_subprocess_exec
    parent = a_parent(tmp_path, shutdown_timeout_s=60)

    async def late(*command: Any, **more: Any) -> asyncio.subprocess.Process:
        parent._stopping.set()
        await asyncio.sleep(0.2)
        return await start(*command, **more)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", late)
    assert await asyncio.wait_for(parent.run(), 10) == 0
    process = parent._workers[0].process
    assert process is not None
    assert process.returncode == -signal.SIGTERM


def test_a_board_has_a_row_for_each_worker(tmp_path: Path) -> None:
    boards = [Board(tmp_path / "board", worker, 3) for worker in range(3)]
    slots = {board.slot("assistant:int8", "http://127.0.0.1:1") for board in boards}
    assert len(slots) == 1, "all mean the same column"
    slot = slots.pop()
    for worker, board in enumerate(boards):
        board.write(slot, worker + 1)
    assert [board.others(slot) for board in boards] == [5, 4, 3]
    again = Board(tmp_path / "board", 1, 3)
    assert boards[0].others(slot) == 3, "a worker that starts again has nothing in flight"
    for board in (*boards, again):
        board.close()


def test_no_two_replicas_share_a_column(tmp_path: Path) -> None:
    boards = [Board(tmp_path / "board", worker, 2) for worker in range(2)]
    urls = [f"http://10.0.{n // 256}.{n % 256}:8000" for n in range(3000)]
    slots = [boards[n % 2].slot("assistant:int8", url) for n, url in enumerate(urls)]
    assert len(set(slots)) == len(urls)
    assert slots == [boards[1 - n % 2].slot("assistant:int8", url) for n, url in enumerate(urls)]
    for board in boards:
        board.close()


def test_columns_that_nobody_uses_are_given_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board_module, "SLOTS", 4)
    boards = [Board(tmp_path / "board", worker, 2) for worker in range(2)]
    for n in range(4):
        assert boards[0].slot("assistant:int8", f"http://old:{n}") == n
    assert boards[1].slot("assistant:int8", "http://old:1") == 1
    assert boards[1].slot("assistant:int8", "http://new") == NO_SLOT
    boards[1].write(NO_SLOT, 7)
    assert boards[0].others(NO_SLOT) == 0, "what has no column is counted by nobody else"
    boards[0].write(1, 5)
    boards[0].free(1)
    assert boards[1].others(1) == 0
    assert boards[1].slot("assistant:int8", "http://new") == NO_SLOT, "the other worker still has it"
    boards[0].free(2)
    assert boards[1].slot("assistant:int8", "http://new") == 2
    boards[0].clear()  # as for a worker that has died
    assert boards[1].slot("assistant:int8", "http://newer") == 0
    for board in boards:
        board.close()


def counted(sheets: Sheets, name: str) -> dict[tuple[str, ...], list[float]]:
    return {labels: list(numbers) for labels, numbers in sheets.numbers(name).items()}


def test_a_sheet_outlives_its_worker(tmp_path: Path) -> None:
    def begin(worker: int) -> Metrics:
        return Metrics(CollectorRegistry(), (), Sheet(tmp_path, worker))

    first, second = begin(0), begin(1)
    sheets = Sheets(tmp_path, 3)
    first.missed.labels("core", "assistant", "bf16").inc(2)
    second.missed.labels("core", "assistant", "bf16").inc()
    second.missed.labels("core", "assistant", "int8").inc()
    second.duration.labels("core", "assistant", "bf16").observe(0.02)
    expected: Callable[[], bool] = lambda: (  # noqa: E731
        counted(sheets, "tiercel_pool_missed_total")
        == {("core", "assistant", "bf16"): [3.0], ("core", "assistant", "int8"): [1.0]}
    )
    assert expected()
    with (tmp_path / "counters-1.index").open("ab") as index:
        index.write(b'["tiercel_pool_mis')  # it was killed as it wrote
    assert expected()
    second = begin(1)
    assert expected(), "it goes on where the one before it was"
    second.missed.labels("core", "assistant", "bf16").inc()
    second.missed.labels("new", "assistant", "bf16").inc()
    assert counted(sheets, "tiercel_pool_missed_total")["core", "assistant", "bf16"] == [4.0]
    assert counted(sheets, "tiercel_pool_missed_total")["new", "assistant", "bf16"] == [1.0]
    assert sum(counted(sheets, "tiercel_request_duration_seconds")["core", "assistant", "bf16"][:-1]) == 1
    assert sheets.restarts() == {0: 0.0, 1: 1.0}
    assert max(sheets.ages().values()) < 5
    assert second.missed.labels("core", "assistant", "bf16").value == 2
    assert os.stat(tmp_path / "counters-0").st_mode & 0o777 == 0o600
