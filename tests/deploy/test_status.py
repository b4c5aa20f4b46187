"""``tiercel status`` and ``tiercel top`` against a running gateway with fake engines."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deploy.cli import main
from deploy.commands.asking import GatewayClient
from deploy.commands.frames import Look, frame, look
from deploy.commands.readings import comparable, flows, parse, percentiles, quantile, seconds_text, span_text
from gateway.identity import hash_of
from gateway.store.database import StoreError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gateway"))

from gateway_stack import Stack, eventually, running_gateway, settings

INT4 = "assistant:int4-kv8"


async def tiercel(*words: str) -> int:
    """Run a command beside the gateway; gives its exit status."""

    def run() -> int:
        try:
            main(list(words))
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    return await asyncio.to_thread(run)


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    async with running_gateway() as running:
        await reached(running)
        yield running


async def reached(stack: Stack) -> None:
    """Wait until the gateway has probed and read all of its engines."""
    replicas = list(stack.gateway.plane.snapshot.pools.replicas())
    await eventually(lambda: all(one.reachable and one.reading.at for one in replicas))


async def ask(stack: Stack, role: str, times: int = 1, **options: Any) -> None:
    for _ in range(times):
        async with stack.post(options, headers={"x-agent-role": role}) as response:
            await response.read()


async def test_all_is_well(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--url", stack.url, "--over", "0.3"]
    assert await tiercel("status", *options) == 0
    shown = capsys.readouterr().out
    assert f"all is well: {stack.url} serves assistant" in shown
    assert re.search(r"int8-0 +ok +0 +0 +0.0 %", shown)
    assert re.search(r"intent_classifier +assistant:int4-kv8 .*cheapest in budget", shown)
    assert re.search(r"summarizer +assistant:int8 .*not assistant:int4-kv8 \(not enough evidence\)", shown)
    assert await tiercel("status", "--json", *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["well"] is True
    assert [role["variant"] for role in found["roles"]] == [
        "assistant:int4-kv8",
        "assistant:int8",
        "assistant:bf16",
    ]
    assert [pool["variant"] for pool in found["pools"]] == [
        "assistant:bf16",
        "assistant:int8",
        "assistant:int4-kv8",
    ]


async def test_rates_are_of_the_time_between_two_readings(stack: Stack) -> None:
    await ask(stack, "core", 5)  # what came before counts for nothing
    gateway = GatewayClient(stack.url, None, local=True)
    before = await asyncio.to_thread(look, gateway)
    await ask(stack, "core", 3)
    await ask(stack, "summarizer", 2, stream=True)
    stack.engines["bf16"].script.status = 500
    await ask(stack, "core")
    now = await asyncio.to_thread(look, gateway)
    passed = now.reading.at - before.reading.at
    found = {(one.role, one.variant): one for one in flows(before.reading, now.reading)}
    core, summarizer = found["core", "assistant:bf16"], found["summarizer", "assistant:int8"]
    assert core.requests * passed == pytest.approx(4)
    assert core.errors * passed == pytest.approx(1)
    assert core.duration is not None
    assert core.first_token is None  # nothing was streamed
    assert summarizer.tokens * passed == pytest.approx(2 * 4)
    assert summarizer.first_token is not None
    assert 0 < summarizer.first_token.p50 <= summarizer.first_token.p95 < passed


async def test_what_is_not_well_is_said_with_what_to_do(
    stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    stack.engines["int8"].script.healthy = False
    stack.engines["bf16"].kv_cache_usage = 0.99
    stack.engines["int4-kv8"].waiting = 40
    order = {"action": "demote", "variant": INT4, "role": "intent_classifier", "why": "looks odd"}
    async with stack.http.post(stack.url + "/admin/watch", json=order) as response:
        assert response.status == 200
    pools = stack.gateway.plane.snapshot.pools.by_variant
    await eventually(lambda: not pools["assistant:int8"].reachable)
    await eventually(
        lambda: stack.sample("tiercel_queue_depth", variant="int4-kv8", replica=f"{INT4}-0") == 40
    )
    usage = {"variant": "bf16", "replica": "assistant:bf16-0"}
    await eventually(lambda: stack.sample("tiercel_kv_cache_usage_ratio", **usage) == 0.99)
    assert await tiercel("status", "--json", "--url", stack.url, "--over", "0.2") == 1
    found = json.loads(capsys.readouterr().out)
    said = {one["what"]: one["fix"] for one in found["not_well"]}
    url = stack.gateway.plane.snapshot.config.pools["assistant:int8"][0]
    assert said.keys() == {
        f"assistant:int8-0 at {url} cannot be reached",
        "the KV cache of assistant:bf16-0 is 99 % full",
        f"40 requests wait in the engines of {INT4}",
        f"{INT4} as intent_classifier is out of service (demoted): looks odd",
    }
    demoted = said[f"{INT4} as intent_classifier is out of service (demoted): looks odd"]
    assert f"tiercel watch restore {INT4} intent_classifier" in demoted
    assert {role["role"]: role["variant"] for role in found["roles"]} == {
        "intent_classifier": "assistant:bf16",
        "summarizer": "assistant:bf16",
        "core": "assistant:bf16",
    }
    reasons = {role["role"]: role["reason"] for role in found["roles"]}
    assert reasons["summarizer"] == "raised_pool_down"
    assert await tiercel("status", "--url", stack.url, "--over", "0.2") == 1
    shown = capsys.readouterr().out
    assert "4 things are not well" in shown
    assert re.search(r"int8-0 +DOWN", shown)


async def test_failing_requests_and_a_variant_that_is_pinned_out(
    stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    order = {
        "action": "pin_demoted",
        "variant": "assistant:int8",
        "role": "summarizer",
        "why": "until Monday",
    }
    async with stack.http.post(stack.url + "/admin/watch", json=order) as response:
        assert response.status == 200
    # A person's decision is shown, and nothing to be alarmed at.
    assert await tiercel("status", "--url", stack.url, "--over", "0.1") == 0
    assert (
        "pinned: assistant:int8 is kept out of summarizer's choice: until Monday" in capsys.readouterr().out
    )
    looking = asyncio.create_task(tiercel("status", "--url", stack.url, "--over", "1", "--json"))
    stack.engines["bf16"].script.status = 500
    while not looking.done():
        await ask(stack, "core")
        await asyncio.sleep(0.05)
    assert await looking == 1
    said = [one["what"] for one in json.loads(capsys.readouterr().out)["not_well"]]
    assert "100.0 % of core's requests fail" in said


async def test_a_store_that_is_down_is_no_reason_to_say_nothing(
    stack: Stack, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def down(*_: Any) -> Any:
        raise StoreError("watch.store: postgresql://db: connection refused")

    monkeypatch.setattr(stack.gateway.watch, "report", down)
    assert await tiercel("status", "--url", stack.url, "--over", "0.1") == 1
    shown = capsys.readouterr().out
    assert "1 thing is not well" in shown
    assert "the watch's store cannot be used: watch.store: postgresql://db: connection refused" in shown


async def test_without_a_watch(capsys: pytest.CaptureFixture[str]) -> None:
    async with running_gateway(watch={"enabled": False}) as stack:
        await reached(stack)
        assert await tiercel("status", "--url", stack.url, "--over", "0.1") == 0
    assert "the watch is off" in capsys.readouterr().out


async def test_who_may_not_ask(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"boss": {"admin": True}, "bound": {"admin": True, "role": "core"}, "user": {}}
    keys = [{"name": name, "sha256": hash_of(name), **more} for name, more in names.items()]
    async with running_gateway(keys=keys) as stack:
        await reached(stack)
        options = ["status", "--url", stack.url, "--over", "0.1"]
        for key, says in (
            ([], "give an admin's key with --key or TIERCEL_KEY"),
            (["--key", "wrong"], "give an admin's key"),
            (["--key", "user"], "no admin's"),
            (["--key", "bound"], "give an admin's key without `role`"),
        ):
            assert await tiercel(*options, *key) == 2
            assert says in capsys.readouterr().err
        assert await tiercel(*options, "--key", "boss") == 0
        monkeypatch.setenv("TIERCEL_KEY", "boss")
        assert await tiercel(*options) == 0
    assert await tiercel(*options) == 2
    assert "does not answer" in capsys.readouterr().err
    assert await tiercel("status", "--config", str(tmp_path / "no.yaml")) == 2
    assert "does not exist" in capsys.readouterr().err
    for no_time in ("0", "nan", "inf", "1e300"):
        assert await tiercel(*options[:3], "--over", no_time) == 2
        assert f"--over: {float(no_time):g} is no time" in capsys.readouterr().err


async def test_no_proxy_leads_to_the_address_of_the_file(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "tiercel.yaml"
    port = int(stack.url.rpartition(":")[2])
    await asyncio.to_thread(path.write_text, settings(tmp_path, {}, gateway={"port": port}))
    assert await tiercel("status", "--config", str(path), "--over", "0.1") == 0
    assert await tiercel("status", "--url", stack.url) == 2


async def test_what_is_no_gateway_is_said(capsys: pytest.CaptureFixture[str], stack: Stack) -> None:
    engine = stack.gateway.plane.snapshot.config.pools["assistant:bf16"][0]
    for command in ("status", "top"):
        assert await tiercel(command, "--url", engine, *(["--once"] if command == "top" else [])) == 2
        assert "give --url" in capsys.readouterr().err


def test_percentiles_are_those_of_the_buckets() -> None:
    buckets = {0.1: 10.0, 0.5: 18.0, 1.0: 20.0, float("inf"): 20.0}
    assert quantile(0.5, buckets) == pytest.approx(0.1)
    assert quantile(0.95, buckets) == pytest.approx(0.75)
    assert quantile(0.25, buckets) == pytest.approx(0.05)
    assert quantile(0.99, {1.0: 5.0, float("inf"): 10.0}) == float("inf")
    assert percentiles({}) is None
    assert percentiles({1.0: 0.0, float("inf"): 0.0}) is None
    assert [seconds_text(s) for s in (0.0084, 0.12, 0.9996, 1.24, 9.96, 85.2, float("inf"))] == [
        "8.4ms",
        "120ms",
        "1.0s",
        "1.2s",
        "10s",
        "85s",
        ">600s",
    ]
    assert [span_text(s) for s in (42, 720, 11_100, 180_000)] == ["42 s", "12 min", "3 h 5 min", "2 d 2 h"]


def counted(at: float, requests: int, outcome: str = "200") -> str:
    labels = f'role="core",requested="m",model="m",variant="bf16",outcome="{outcome}"'
    return f"# TYPE tiercel_requests counter\ntiercel_requests_total{{{labels}}} {requests}.0\n"


def test_a_gateway_that_was_started_anew_has_no_rate() -> None:
    before, later, anew = parse(counted(0, 50), 0.0), parse(counted(1, 60), 2.0), parse(counted(1, 10), 2.0)
    assert comparable(before, later)
    assert flows(before, later)[0].requests == pytest.approx(5)
    assert not comparable(before, anew)
    assert not comparable(before, parse("", 2.0))
    text = shown(frame("http://x", Look(anew, {}), Look(before, {})))
    assert "waiting for the next reading: the gateway was started anew" in text
    with pytest.raises(ValueError, match=r".+"):
        parse("tiercel_requests_total{role= 3", 0.0)


def test_a_client_that_left_is_nobodys_error() -> None:
    (flow,) = flows(parse("", 0.0), parse(counted(1, 10, "499"), 1.0))
    assert (flow.requests, flow.refused, flow.errors) == (10, 0, 0)
    (flow,) = flows(parse("", 0.0), parse(counted(1, 10, "429"), 1.0))
    assert (flow.refused, flow.errors) == (10, 0)


def shown(drawn: Any, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(drawn)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_frame_fits_a_small_terminal() -> None:
    lines = [
        f'tiercel_requests_total{{role="{"a_very_long_role_" * 6}{n}",requested="m",'
        f'model="m",variant="int4-kv8",outcome="200"}} {n}.0'
        for n in range(60)
    ]
    replica = {"url": "http://engines.default.svc.cluster.local:8000", "reachable": True, "usable": False}
    pools = {"m:int4-kv8": {"replicas": {"m:int4-kv8-0": replica | {"in_flight": 123}}}}
    before, now = Look(parse("", 0.0), pools), Look(parse("\n".join(lines), 1.0), pools)
    text = shown(frame("http://127.0.0.1:8080", now, before, "it does not answer", 80, 24))
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) <= 24
    assert "59.0" in text  # the busiest is there
    assert "quieter" in text
    assert "FAILING" in text
    assert "it does not answer" in text
    assert "m:int4-kv8" not in text  # of one model there is no need to say which
    pools |= {"other:int8": {"replicas": {"other:int8-0": replica | {"in_flight": 1}}}}
    text = shown(frame("http://127.0.0.1:8080", Look(now.reading, pools), None, width=120))
    assert "m:int4-kv8-0" in text
    assert "other:int8-0" in text


async def test_top_prints_one_frame(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    showing = asyncio.create_task(tiercel("top", "--once", "--every", "1.5", "--url", stack.url))
    while not showing.done():
        await ask(stack, "intent_classifier", stream=True)
        await asyncio.sleep(0.05)
    assert await showing == 0
    text = capsys.readouterr().out
    assert re.search(r"intent_classifier int4-kv8 +(?!0\.0)\d+\.\d +0.0 +0.0 +[\d.]+m?s/[\d.]+m?s", text)
    assert "int4-kv8-0 ok" in text
    assert await tiercel("top", "--url", stack.url) == 2
    assert "print one frame with `tiercel top --once`" in capsys.readouterr().err
    assert await tiercel("top", "--url", stack.url, "--every", "0") == 2


class Terminal:
    """``tiercel top`` in a pseudo-terminal of 80 columns."""

    def __init__(self, url: str) -> None:
        self.outer, self.inner = pty.openpty()
        fcntl.ioctl(self.inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(self.inner)
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", "top", "--every", "0.3", "--url", url],
            stdin=self.inner,
            stdout=self.inner,
            stderr=self.inner,
            env={**kept, "TERM": "xterm-256color"},
            start_new_session=True,
            # So that Ctrl-C reaches it as it does a shell's foreground job.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self.text = ""

    def until(self, pattern: str, within_s: float = 60.0) -> str:
        """All that was shown, when it matches."""
        deadline = time.monotonic() + within_s
        while not re.search(pattern, self.text):
            assert time.monotonic() < deadline, f"{pattern} is not in {self.text}"
            if select.select([self.outer], [], [], 0.2)[0]:
                self.text += os.read(self.outer, 65_536).decode()
        return self.text

    def press(self, keys: bytes) -> None:
        os.write(self.outer, keys)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for descriptor in (self.outer, self.inner):
            with contextlib.suppress(OSError):
                os.close(descriptor)


@pytest.mark.parametrize("keys", [b"q", b"\x03"])
async def test_top_in_a_terminal(stack: Stack, keys: bytes) -> None:
    terminal = await asyncio.to_thread(Terminal, stack.url)
    try:
        await asyncio.to_thread(terminal.until, "waiting for the next reading: rates need a second one")
        await ask(stack, "core", 3)
        await asyncio.to_thread(terminal.until, r"core +bf16 +[1-9]")
        assert "\x1b[?1049h" in terminal.text  # a screen of its own, and the old one again at the end
        terminal.press(keys)
        await asyncio.to_thread(terminal.until, r"\x1b\[\?1049l", 10)
        assert await asyncio.to_thread(terminal.process.wait, 10) == 0
        assert termios.tcgetattr(terminal.inner) == terminal.before
    finally:
        terminal.close()


async def test_top_waits_for_a_gateway_that_went_away() -> None:
    async with running_gateway() as stack:
        await reached(stack)
        terminal = await asyncio.to_thread(Terminal, stack.url)
        await asyncio.to_thread(terminal.until, "requests/s")
    try:
        await asyncio.to_thread(terminal.until, "does not answer")
        terminal.press(b"q")
        assert await asyncio.to_thread(terminal.process.wait, 15) == 0
    finally:
        terminal.close()
