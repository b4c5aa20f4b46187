"""What clients and surroundings that mean no good do to everybody else's requests.

    python -m benchmarks.gateway.hostile --repeats 3 --seconds 4

One client sends requests of 1 KB, one after another, on a kept connection; its median and 99th percentile are
taken without and with each trouble, in turn, so that what else the machine does is in both. Whoever makes
trouble is a process of its own, and what it sends goes to another engine. All is bounded and on this
machine's loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvloop

from benchmarks.gateway.load import request
from benchmarks.gateway.peers import ROOT, WORK, free_port, tiercel, wait_for
from gateway.routing.policies import PickQuery, SessionAffinity

RESULT = ROOT / "var/benchmarks/gateway/hostile.json"
AIM = 1.5
LARGE = 8_000_000
SLOW_CLIENTS = 1000


@dataclass
class Setting:
    """What runs: a gateway, an engine for the client that is measured, and one for those that are not."""

    port: int
    tls: bool = False
    mine: str = ""
    other: str = ""
    """Sessions at the engine of the client that is measured, and at the other one."""
    counted: int = 0
    """How often the trouble did what it does."""

    def connect(self) -> Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        return asyncio.open_connection("127.0.0.1", self.port, ssl=_unchecked() if self.tls else None)

    async def ask(self, message: bytes) -> int:
        """Over a connection of its own; gives the status."""
        reader, writer = await self.connect()
        try:
            writer.write(message)
            await writer.drain()
            status = int((await reader.readline()).split()[1])
            while await reader.read(1 << 18):
                pass
            return status
        finally:
            writer.transport.abort()

    def message(self, session: str, *, closes: bool = False, **asked: Any) -> bytes:
        more = f"x-session-id: {session}\r\n" + ("connection: close\r\n" if closes else "")
        return request(self.port, **asked).replace(b"content-length", f"{more}content-length".encode(), 1)

    def large(self, text: str) -> bytes:
        """A body of 8 MB."""
        messages = [{"role": "user", "content": text * (LARGE // len(text.encode()))}]
        body = json.dumps({"model": "assistant", "messages": messages}, ensure_ascii=False).encode()
        head = self.message(self.other, closes=True).partition(b"content-length")[0]
        return b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body)


def _unchecked() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


Trouble = Callable[[Setting], Awaitable[None]]


async def nothing(_: Setting) -> None: ...


def large(text: str) -> Trouble:
    """One client that sends a body of 8 MB, again and again."""

    async def go(setting: Setting) -> None:
        message = setting.large(text)
        while True:
            if await setting.ask(message) == 200:
                setting.counted += 1

    return go


async def slow_clients(setting: Setting) -> None:
    """A thousand that send a byte of their head each second, and a thousand connections with nothing."""

    async def one() -> None:
        with contextlib.suppress(OSError):
            _, writer = await setting.connect()
            try:
                setting.counted += 1
                for byte in b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 1000:
                    writer.write(bytes([byte]))
                    await asyncio.sleep(1.0)
            finally:
                writer.transport.abort()

    async with asyncio.TaskGroup() as group:
        for _ in range(SLOW_CLIENTS):
            group.create_task(one())


async def pipelining(setting: Setting) -> None:
    """Clients that pipeline and do not read."""

    async def one() -> None:
        _, writer = await setting.connect()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        try:
            message = setting.message(setting.other) * 200
            while True:
                writer.write(message)
                setting.counted += 200
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(writer.drain(), 0.5)
                if writer.transport.get_write_buffer_size() > 1 << 20:
                    await asyncio.sleep(3600)
        finally:
            writer.transport.abort()

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(one())


async def handshakes(setting: Setting) -> None:
    """Twenty connections a second that begin TLS and leave within it, and twenty that end it and leave."""
    while True:
        for whole in (False, True):
            with contextlib.suppress(OSError):
                if whole:
                    _, writer = await setting.connect()
                else:
                    _, writer = await asyncio.open_connection("127.0.0.1", setting.port)
                    writer.write(b"\x16\x03\x01\x02\x00\x01")
                    await asyncio.sleep(0)
                writer.transport.abort()
                setting.counted += 1
        await asyncio.sleep(0.05)


async def schema_bombs(setting: Setting) -> None:
    """Requests whose schemas take for ever, each another one."""
    number = 0
    while True:
        steps: dict[str, Any] = {"s0": {"type": "object", "title": f"{number}"}}
        for level in range(1, 60):
            steps[f"s{level}"] = {"allOf": [{"$ref": f"#/$defs/s{level - 1}"}] * 2}
        schema = {"$defs": steps, "$ref": "#/$defs/s59"}
        asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        if await setting.ask(setting.message(setting.other, closes=True, response_format=asked)) == 200:
            setting.counted += 1
        number += 1
        await asyncio.sleep(0.02)


async def burst(setting: Setting) -> None:
    """Sixty-four clients at once, twice a second."""
    while True:
        message = setting.message(setting.other, closes=True)
        await asyncio.gather(*(setting.ask(message) for _ in range(64)), return_exceptions=True)
        setting.counted += 64
        await asyncio.sleep(0.5)


@dataclass(frozen=True)
class Case:
    """``config`` is laid over the gateway's; ``around`` is what the trouble is, where that is no client."""

    name: str
    trouble: Trouble = nothing
    config: dict[str, Any] = field(default_factory=dict)
    kind: str = "clients"


CASES = (
    Case("8 MB bodies, ASCII", large("hello world ")),
    Case("8 MB bodies, other letters", large("größe ")),
    Case("8 MB bodies, escapes", large('\n"\\')),
    Case("1,000 slow clients", slow_clients),
    Case("4 that pipeline and do not read", pipelining),
    Case("schema bombs, all sampled", schema_bombs, {"quality": {"sample_rate": 1.0}}),
    Case("TLS handshakes, 40 a second", handshakes, kind="tls"),
    Case("a log pipe that nobody reads", kind="pipe"),
    Case("run_dir that cannot be written", kind="run_dir"),
    Case("a database that does not answer", kind="database"),
    Case("hedged, bursts of 64", burst, kind="bursts"),
)


@contextlib.asynccontextmanager
async def running(case: Case, troubled: bool) -> AsyncIterator[Setting]:
    """A gateway of the case. What is no client's doing is there only if ``troubled``."""
    port, engine, other = free_port(), free_port(), free_port()
    config: dict[str, Any] = {
        "pools": {
            "bf16": [f"http://127.0.0.1:{engine}", f"http://127.0.0.1:{other}"],
            "int8": [f"http://127.0.0.1:{other}"],
        },
        "gateway": {"port": port, "policy": "session_affinity"},
        **case.config,
    }
    folder = WORK / "hostile"
    folder.mkdir(parents=True, exist_ok=True)
    if case.kind == "tls":
        certificate, key = _certificate(folder)
        config["gateway"] |= {"tls_certificate": str(certificate), "tls_key": str(key)}
    if case.kind == "run_dir" and troubled:
        config["run_dir"] = "/proc/tiercel"  # where nobody, root included, can make a file
    if case.kind == "database":
        config["watch"] = {"store": "postgresql://nobody:none@127.0.0.1:9/none"} if troubled else {}
    if case.kind == "bursts":
        config["roles"] = {"core": {"hedge": True}, "summarizer": {}}
    command, ready = tiercel(port, engine, **config)
    pipe = subprocess.PIPE if case.kind == "pipe" and troubled else subprocess.DEVNULL
    upstream = [sys.executable, "-m", "benchmarks.gateway.upstream", "--port"]
    engines = [_started([*upstream, str(each)]) for each in (engine, other)]
    gateway = _started(command, pipe)
    try:
        if case.kind == "tls":
            await _opens(port, gateway)
        else:
            await asyncio.to_thread(wait_for, f"http://127.0.0.1:{port}{ready}", gateway)
        mine, others = sessions(config["pools"]["bf16"])
        yield Setting(port, case.kind == "tls", mine, others)
    finally:
        gateway.send_signal(signal.SIGTERM)
        for engine_process in engines:
            engine_process.terminate()
        for process in (gateway, *engines):
            try:
                await asyncio.to_thread(process.wait, 15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if gateway.stderr is not None:
            gateway.stderr.close()


def _started(command: list[str], pipe: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=pipe)


def sessions(urls: list[str]) -> tuple[str, str]:
    """One for each of two replicas."""
    policy, replicas = SessionAffinity(), [SimpleNamespace(url=url) for url in urls]
    found: dict[str, str] = {}
    for number in range(1000):
        chosen, _ = policy.pick(replicas, PickQuery(f"s{number}"))  # type: ignore[arg-type]
        found.setdefault(chosen.url, f"s{number}")
    return found[urls[0]], found[urls[1]]


async def _opens(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=_unchecked())
        except OSError:
            if process.poll() is not None:
                raise SystemExit("the gateway with TLS did not start") from None
            await asyncio.sleep(0.1)
        else:
            writer.transport.abort()
            return


def _certificate(folder: Path) -> tuple[Path, Path]:
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    if not certificate.exists():
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        command += ["-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)]
        subprocess.run(command, check=True, capture_output=True)
    return certificate, key


async def latencies(setting: Setting, seconds: float) -> list[float]:
    """Milliseconds, one request after another. Raises RuntimeError for any other status than 200."""
    message, found = setting.message(setting.mine), []
    reader, writer = await setting.connect()
    try:
        until = time.perf_counter() + seconds
        while (began := time.perf_counter()) < until:
            writer.write(message)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"somebody else's request was refused: {head[:80]!r}")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r")[0])
            await reader.readexactly(length)
            found.append(1000 * (time.perf_counter() - began))
            await asyncio.sleep(0.002)
    finally:
        writer.transport.abort()
    return found


def _quantiles(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[len(ordered) // 2], ordered[int(0.99 * (len(ordered) - 1))]


async def measure(case: Case, repeats: int, seconds: float) -> dict[str, Any]:
    """By turns without and with the trouble; all latencies of each together."""
    without: list[float] = []
    within: list[float] = []
    ratios, counted = [], 0
    apart = case.kind in ("pipe", "run_dir", "database")
    async with contextlib.AsyncExitStack() as stack:
        calm = await stack.enter_async_context(running(case, troubled=False))
        bad = await stack.enter_async_context(running(case, troubled=True)) if apart else calm
        await latencies(calm, 0.5)
        await latencies(bad, 0.5)
        for _ in range(repeats):
            before = await latencies(calm, seconds)
            command = [
                sys.executable,
                "-m",
                "benchmarks.gateway.hostile",
                "--trouble",
                case.name,
                str(bad.port),
            ]
            process = await asyncio.create_subprocess_exec(
                *command, bad.mine, bad.other, cwd=ROOT, stdout=subprocess.PIPE
            )
            await asyncio.sleep(1.5)
            try:
                during = await latencies(bad, seconds)
            finally:
                process.terminate()
                said, _ = await process.communicate()
                counted += int(said or 0)
            without += before
            within += during
            ratios.append(_quantiles(during)[1] / _quantiles(before)[1])
            await asyncio.sleep(0.5)
    (p50, p99), (p50_with, p99_with) = _quantiles(without), _quantiles(within)
    return {
        "p50_ms": p50,
        "p99_ms": p99,
        "p50_with_ms": p50_with,
        "p99_with_ms": p99_with,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "requests": len(within),
        "trouble": counted,
    }


async def make_trouble(case: Case, setting: Setting) -> None:
    """Until SIGTERM; then it says how often it did what it does."""
    task: asyncio.Task[None] = asyncio.create_task(case.trouble(setting))  # type: ignore[arg-type]
    print("begun", flush=True)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task
        await asyncio.sleep(3600)  # it is not a client's doing
    print(setting.counted)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--seconds", type=float, default=4.0)
    options.add_argument("--only", nargs="+", help="parts of the cases' names")
    options.add_argument("--trouble", nargs=4, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.trouble:
        name, port, mine, other = given.trouble
        case = next(case for case in CASES if case.name == name)
        uvloop.run(make_trouble(case, Setting(int(port), case.kind == "tls", mine, other)))
        return
    found = {}
    print("| trouble | p50, ms | p99, ms | p50 with it | p99 with it | p99 ÷ without (each repeat) |")
    print("|---|---|---|---|---|---|")
    for case in CASES:
        if given.only and not any(part in case.name for part in given.only):
            continue
        one = found[case.name] = asyncio.run(measure(case, given.repeats, given.seconds))
        ratios = ", ".join(f"{ratio:.2f}" for ratio in one["ratios"])
        print(
            f"| {case.name} ({one['trouble']}) | {one['p50_ms']:.2f} | {one['p99_ms']:.1f} "
            f"| {one['p50_with_ms']:.2f} | {one['p99_with_ms']:.1f} | {one['ratio']:.2f} ({ratios}) |",
            flush=True,
        )
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
