"""Gateways side by side on one core each, interleaved, with the load and a fast fake engine on the other.

    python -m benchmarks.gateway.run                      # all peers, three rounds, about 20 minutes
    python -m benchmarks.gateway.run --peers tiercel nginx --rounds 1 --seconds 3
    python -m benchmarks.gateway.run --python ../other/.venv/bin/python      # Tiercel with that one too

Needs ``wrk`` and ``nginx`` (Debian's packages). Results: ``var/benchmarks/gateway/result.json``, and the
table of ``docs/benchmarks/gateway.md`` on standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.gateway.load import disconnects, open_streams, paced
from benchmarks.gateway.peers import (
    KEY,
    OTHER_CORE,
    PEERS,
    ROOT,
    WORK,
    Peer,
    Running,
    free_port,
    tiercel,
    wait_for,
)

OTHER_PYTHON = "tiercel, other Python"
TESTS = ("small", "large", "streams", "one", "paced", "open", "disconnects")
SMALL, LARGE = 1_000, 16_000
CONNECTIONS = 32


def body(size: int, **more: Any) -> bytes:
    """A chat request of about ``size`` bytes, as OpenAI's client sends it."""
    said = "Please look at this text and say what it means. " * (size // 48)
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": said},
    ]
    return json.dumps({"messages": messages, "model": "assistant", "temperature": 0.5, **more}).encode()


def wrk(port: int, payload: bytes, connections: int, seconds: float, name: str) -> dict[str, float]:
    """Requests per second, errors, and the median latency in ms."""
    script = WORK / f"{name}.lua"
    quoted = payload.decode().replace("\\", "\\\\").replace('"', '\\"')
    script.write_text(
        f'wrk.method = "POST"\nwrk.body = "{quoted}"\n'
        'wrk.headers["content-type"] = "application/json"\n'
        f'wrk.headers["authorization"] = "Bearer {KEY}"\n'
        'wrk.headers["accept"] = "application/json"\nwrk.headers["user-agent"] = "OpenAI/Python 2.54.0"\n'
    )
    command = [
        "taskset",
        "-c",
        str(OTHER_CORE),
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds:g}s",
        "--latency",
    ]
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    output = subprocess.run(
        [*command, "-s", str(script), url], capture_output=True, text=True, check=True
    ).stdout
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", output)[1])  # type: ignore[index]
    median = re.search(r"50%\s+([\d.]+)(us|ms|s)", output)
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", output)
    socket_errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", output)
    total = float(re.search(r"(\d+) requests in", output)[1])  # type: ignore[index]
    factor = {"us": 0.001, "ms": 1.0, "s": 1000.0}
    return {
        "rate": rate,
        "p50_ms": float(median[1]) * factor[median[2]] if median else float("nan"),
        "errors": float(failed[1] if failed else 0)
        + sum(map(float, socket_errors.groups() if socket_errors else ())),
        "requests": total,
    }


def measure(test: str, running: Running, upstream_port: int, seconds: float) -> dict[str, Any]:
    """One test of one gateway, once."""
    port, name = running.port, f"{running.port}-{test}"
    before = running.cpu_s()
    if test in ("small", "large", "streams", "one"):
        payload = {
            "small": body(SMALL),
            "large": body(LARGE),
            "streams": body(SMALL, stream=True, max_tokens=64),
            "one": body(SMALL),
        }[test]
        found: dict[str, Any] = wrk(port, payload, 1 if test == "one" else CONNECTIONS, seconds, name)
        found["cpu_us"] = 1e6 * (running.cpu_s() - before) / max(1.0, found["requests"])
    elif test == "paced":
        found = asyncio.run(paced(port, streams=256, chunks=100, pause_ms=50))
        found["cpu_us_per_chunk"] = 1e6 * (running.cpu_s() - before) / (256 * 100)
    elif test == "open":
        found = asyncio.run(open_streams(port, streams=2000, chunks=40, pause_ms=250))
        found["rss_mb"] = running.rss_mb()
    else:
        found = asyncio.run(disconnects(port, upstream_port))
    return found | {"rss_after_mb": running.rss_mb()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--tests", nargs="+", default=list(TESTS), choices=list(TESTS))
    parser.add_argument("--python", help="of another environment with Tiercel's packages: one more peer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    for tool in ("wrk", "nginx", "taskset"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is missing; install it (apt install wrk nginx-light util-linux)")
    WORK.mkdir(parents=True, exist_ok=True)
    if options.python:
        other = PEERS[OTHER_PYTHON] = Peer(OTHER_PYTHON, partial(tiercel_with, options.python))
        options.peers.insert(1, other.name)
    rows = run(options.peers, options.tests, options.rounds, options.seconds)
    (WORK / "result.json").write_text(json.dumps(rows, indent=1))
    print(format_rows(rows, options.peers, options.tests))


def tiercel_with(python: str, port: int, upstream: int) -> tuple[list[str], str]:
    """Tiercel with another interpreter."""
    (_, *command), ready = tiercel(port, upstream)
    return [python, *command], ready


def run(peers: list[str], tests: list[str], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Every test of every peer, one after the other, again and again."""
    upstream_port = free_port()
    command = [sys.executable, "-m", "benchmarks.gateway.upstream", "--port", str(upstream_port)]
    upstream = subprocess.Popen(["taskset", "-c", str(OTHER_CORE), *command], cwd=ROOT)
    running: dict[str, Running] = {}
    rows = []
    try:
        wait_for(f"http://127.0.0.1:{upstream_port}/health", upstream)
        for name in peers:
            running[name] = Running(PEERS[name], upstream_port)
            wrk(running[name].port, body(SMALL), CONNECTIONS, 1.0, "warm")
        for round_number in range(rounds):
            for test in tqdm(tests, desc=f"round {round_number + 1} of {rounds}"):
                for name in peers:
                    if test in PEERS[name].without:
                        continue
                    found = measure(test, running[name], upstream_port, seconds)
                    rows.append({"peer": name, "test": test, "round": round_number, **found})
    finally:
        for one in running.values():
            one.stop()
        upstream.terminate()
        upstream.wait()
    return rows


Get = Callable[[dict[str, Any]], Any]
COLUMNS: tuple[tuple[str, str, Get, str], ...] = (
    ("req/s", "small", lambda row: row["rate"], "{:,.0f}"),
    ("µs CPU", "small", lambda row: row["cpu_us"], "{:.1f}"),
    ("16 KB req/s", "large", lambda row: row["rate"], "{:,.0f}"),
    ("streams/s", "streams", lambda row: row["rate"], "{:,.0f}"),
    ("µs CPU per stream", "streams", lambda row: row["cpu_us"], "{:.0f}"),
    ("p50 at 1, ms", "one", lambda row: row["p50_ms"], "{:.3f}"),
    ("µs CPU per chunk", "paced", lambda row: row["cpu_us_per_chunk"], "{:.1f}"),
    ("p99 chunk delay, ms", "paced", lambda row: row["p99_ms"], "{:.1f}"),
    ("2,000 streams: errors", "open", lambda row: row["errors"], "{:.0f}"),
    ("RSS, MB", "open", lambda row: row["rss_mb"], "{:.0f}"),
    ("errors", "small", lambda row: row["errors"], "{:.0f}"),
)


def format_rows(rows: list[dict[str, Any]], peers: list[str], tests: list[str]) -> str:
    """Medians with the least and the most of the rounds, and the disconnects, as Markdown."""
    shown = [column for column in COLUMNS if column[1] in tests]
    lines = [
        "| gateway | " + " | ".join(column[0] for column in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for peer in peers:
        cells = []
        for _, test, get, form in shown:
            values = [get(row) for row in rows if row["peer"] == peer and row["test"] == test]
            if not values:
                cells.append("–")
                continue
            middle = form.format(statistics.median(values))
            cells.append(f"{middle} ({form.format(min(values))}–{form.format(max(values))})")
        lines.append(f"| {peer} | " + " | ".join(cells) + " |")
    if "disconnects" in tests:
        lines += [
            "",
            "| gateway | mid-stream | before the first byte, streamed | not streamed |",
            "|---|---|---|---|",
        ]
        for peer in peers:
            found = [row for row in rows if row["peer"] == peer and row["test"] == "disconnects"]
            kinds = ("mid_stream", "before_first", "not_streamed")
            cells = [" / ".join(_ms(row[kind]) for row in found) for kind in kinds]
            lines.append(f"| {peer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ms(seconds: float | None) -> str:
    return "never" if seconds is None else f"{1000 * seconds:.0f} ms"


def cancelled(port: int) -> int:
    """Requests that the fake engine saw cut off."""
    return int(urllib.request.urlopen(f"http://127.0.0.1:{port}/cancelled", timeout=5).read())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
