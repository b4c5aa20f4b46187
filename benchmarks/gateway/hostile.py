"""What clients and surroundings that mean no good do to everybody else's requests.

    python -m benchmarks.gateway.hostile --repeats 3 --seconds 4
    python -m benchmarks.gateway.hostile --repeats 3 --seconds 4 --gateway nginx

One client sends requests of 1 KB, one after another, on a kept connection; its median and 99th percentile are
taken without and with each trouble, in turn, so that what else the machine does is in both. Whoever makes
trouble is a process of its own, and what it sends goes to another engine. All is bounded and on this
machine's loopback. What clients do is done to nginx as well, where it is asked for: what remains of a trouble
there is what the machine alone costs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvloop

from benchmarks.gateway.hostile_troubles import (
    SLOW_CLIENTS,
    Setting,
    Trouble,
    burst,
    handshakes,
    large,
    nothing,
    pipelining,
    schema_bombs,
    slow_clients,
    unchecked,
)
from benchmarks.gateway.peers import ROOT, WORK, free_port, nginx, tiercel, wait_for
from gateway.routing.policies import PickQuery, SessionAffinity

AIM = 1.5
BEGINS_WITHIN_S = 60.0


@dataclass(frozen=True)
class Case:
    """``config`` is laid over the gateway's; ``around`` is what the trouble is, where that is no client."""

    name: str
    trouble: Trouble = nothing
    config: dict[str, Any] = field(default_factory=dict)
    kind: str = "clients"
    least: int = 1
    """So often the trouble must have done what it does before anything is measured."""
    goes_on: bool = True
    """It does so again and again; else it is there, and lasts."""


CASES = (
    Case("8 MB bodies, ASCII", large("hello world ")),
    Case("8 MB bodies, other letters", large("größe ")),
    Case("8 MB bodies, escapes", large('\n"\\')),
    Case("1,000 slow clients", slow_clients, least=SLOW_CLIENTS, goes_on=False),
    Case("4 that pipeline and do not read", pipelining, least=4 * 200, goes_on=False),
    Case("schema bombs, all sampled", schema_bombs, {"quality": {"sample_rate": 1.0}}),
    Case("TLS handshakes, 40 a second", handshakes, kind="tls"),
    Case("a log pipe that nobody reads", kind="pipe", least=0, goes_on=False),
    Case("run_dir that cannot be written", kind="run_dir", least=0, goes_on=False),
    Case("a database that refuses connections", kind="database", least=0, goes_on=False),
    Case("hedged, bursts of 64", burst, kind="bursts"),
)


GATEWAYS = ("tiercel", "nginx")


def gateway_of(case: Case, troubled: bool, port: int, engine: int, other: int) -> tuple[list[str], str]:
    """The command that starts Tiercel as the case has it, and the path that answers when it is ready."""
    config: dict[str, Any] = {
        "pools": {
            "bf16": [f"http://127.0.0.1:{engine}", f"http://127.0.0.1:{other}"],
            "int8": [f"http://127.0.0.2:{other}"],
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
    return tiercel(port, engine, **config)


@contextlib.asynccontextmanager
async def running(case: Case, troubled: bool, which: str = "tiercel") -> AsyncIterator[Setting]:
    """A gateway of the case. What is no client's doing is there only if ``troubled``."""
    port, engine, other = free_port(), free_port(), free_port()
    mine, others = sessions([f"http://127.0.0.1:{engine}", f"http://127.0.0.1:{other}"])
    if which == "nginx":
        command, ready = nginx(port, engine, other, others)
    else:
        command, ready = gateway_of(case, troubled, port, engine, other)
    pipe = subprocess.PIPE if case.kind == "pipe" and troubled else subprocess.DEVNULL
    upstream = [sys.executable, "-m", "benchmarks.gateway.upstream", "--port"]
    engines = [_started([*upstream, str(each)]) for each in (engine, other)]
    gateway = _started(command, pipe)
    try:
        if case.kind == "tls":
            await _opens(port, gateway)
        else:
            await asyncio.to_thread(wait_for, f"http://127.0.0.1:{port}{ready}", gateway)
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
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=unchecked())
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


async def measure(case: Case, repeats: int, seconds: float, which: str) -> dict[str, Any]:
    """By turns without and with the trouble; all latencies of each together."""
    without: list[float] = []
    within: list[float] = []
    ratios, counted, statuses = [], 0, Counter[str]()
    apart = case.kind in ("pipe", "run_dir", "database")
    async with contextlib.AsyncExitStack() as stack:
        calm = await stack.enter_async_context(running(case, troubled=False, which=which))
        bad = await stack.enter_async_context(running(case, troubled=True)) if apart else calm
        await latencies(calm, 0.5)
        await latencies(bad, 0.5)
        for _ in range(repeats):
            before = await latencies(calm, seconds)
            async with troubling(case, bad) as counts:
                during = await latencies(bad, seconds)
            counted += counts["counted"]
            statuses.update(counts["other_statuses"])
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
        "other_statuses": statuses,
    }


@contextlib.asynccontextmanager
async def troubling(case: Case, setting: Setting) -> AsyncIterator[dict[str, Any]]:
    """Trouble while the block lasts, which begins when it is there; then what it counted is in the dict.
    Raises RuntimeError where nothing comes of it."""
    command = [sys.executable, "-m", "benchmarks.gateway.hostile", "--trouble", case.name, str(setting.port)]
    process = await asyncio.create_subprocess_exec(
        *command, setting.mine, setting.other, cwd=ROOT, stdout=subprocess.PIPE
    )
    counts: dict[str, Any] = {}
    assert process.stdout is not None
    try:
        begun = await asyncio.wait_for(process.stdout.readline(), BEGINS_WITHIN_S)
        yield counts
    except TimeoutError:
        begun = b""
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        said, _ = await process.communicate()
    counts |= json.loads(said or '{"counted": 0, "other_statuses": {}}')
    if not begun or (case.goes_on and counts["counted"] == json.loads(begun)["counted"]):
        raise RuntimeError(f"{case.name}: no trouble was made: {counts}")


async def make_trouble(case: Case, setting: Setting) -> None:
    """Until SIGTERM. Says what it counted when it has begun in earnest, and at its end."""

    def say() -> None:
        print(json.dumps({"counted": setting.counted, "other_statuses": setting.other_statuses}), flush=True)

    async def begin() -> None:
        while setting.counted < case.least:  # noqa: ASYNC110 -- it is counted in many places
            await asyncio.sleep(0.01)
        say()

    task: asyncio.Task[None] = asyncio.create_task(case.trouble(setting))  # type: ignore[arg-type]
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    beginning = asyncio.create_task(begin())
    await stop.wait()
    beginning.cancel()
    task.cancel()
    _, *errors = await asyncio.gather(beginning, task, return_exceptions=True)
    say()
    for error in errors:
        if isinstance(error, Exception):
            raise error


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--seconds", type=float, default=4.0)
    options.add_argument("--only", nargs="+", help="parts of the cases' names")
    options.add_argument(
        "--gateway", choices=GATEWAYS, default="tiercel", help="nginx: what clients do alone"
    )
    options.add_argument("--trouble", nargs=4, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.trouble:
        name, port, mine, other = given.trouble
        case = next(case for case in CASES if case.name == name)
        uvloop.run(make_trouble(case, Setting(int(port), case.kind == "tls", mine, other)))
        return
    found = {}
    print(f"Load of the machine before: {os.getloadavg()[0]:.1f}.")
    print("| trouble | p50, ms | p99, ms | p50 with it | p99 with it | p99 ÷ without (each repeat) |")
    print("|---|---|---|---|---|---|")
    for case in CASES:
        if given.only and not any(part in case.name for part in given.only):
            continue
        if given.gateway == "nginx" and case.kind != "clients":
            continue
        one = found[case.name] = asyncio.run(measure(case, given.repeats, given.seconds, given.gateway))
        ratios = ", ".join(f"{ratio:.2f}" for ratio in one["ratios"])
        print(
            f"| {case.name} ({one['trouble']}) | {one['p50_ms']:.2f} | {one['p99_ms']:.1f} "
            f"| {one['p50_with_ms']:.2f} | {one['p99_with_ms']:.1f} | {one['ratio']:.2f} ({ratios}) |",
            flush=True,
        )
    (WORK / f"hostile-{given.gateway}.json").write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
