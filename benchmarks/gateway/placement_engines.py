"""Where requests are placed, on real agent traces against two real engines, through real gateways.

    python -m benchmarks.gateway.placement_engines --traces path/to/agent_traces      # about 20 minutes

Sessions are cut from the traces as in ``placement.py``, at a 64th of their length and with 32 tokens for a
block, so that they fit into the demo model. Two vLLM engines on the CPU serve it, once with room for all of
their prompts and once for a quarter of them each. Gateways take turns within each round, and every one of
them finds empty caches. Only ``session_affinity`` is sent session ids. Hits are the engines' own count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from benchmarks.gateway.peers import KEY, ROOT, WORK, environment, free_port, tiercel, variants, wait_for
from benchmarks.gateway.placement import TUNED_ON, Session, Turn, load, simulate, working_set
from deploy.engine import EngineProcess, EngineSpec
from gateway.config import Engine as EngineSettings
from gateway.routing.policies import RoundRobin

SCALE = 64
TOKENS_PER_BLOCK = 32
ROOM = 1024
"""Tokens of the longest prompt and its answer."""
VOCABULARY = range(300, 2000)
"""Tokens that are words."""
LONGEST_ANSWER = 12
ARRIVE_S = 10.0
ENGINES = 2
_HITS = re.compile(r"^vllm:prefix_cache_(hits|queries)_total\{[^}]*\} (\S+)$", re.MULTILINE)


@dataclass
class Replay:
    """What came of one replay."""

    ttfts: list[float] = field(default_factory=list)
    errors: int = 0
    seconds: float = 0.0
    hit_rate: float = 0.0


def tokens_of(chain: Sequence[int]) -> list[int]:
    """The prompt's token ids: blocks that are the same are the same tokens."""
    tokens: list[int] = []
    for block in chain:
        rng = random.Random(block)
        tokens += [rng.choice(VOCABULARY) for _ in range(TOKENS_PER_BLOCK)]
    return tokens[: ROOM - LONGEST_ANSWER - 4]


async def ask(
    client: aiohttp.ClientSession, url: str, turn: Turn, session: str | None, found: Replay
) -> None:
    request = {
        "model": "assistant",
        "prompt": tokens_of(turn.chain),
        "max_tokens": min(turn.out, LONGEST_ANSWER),
        "ignore_eos": True,
        "stream": True,
    }
    headers = {"x-session-id": session} if session else {}
    sent = time.monotonic()
    async with client.post(f"{url}/v1/completions", json=request, headers=headers) as response:
        first = None
        async for _ in response.content.iter_any():
            first = first or time.monotonic() - sent
        if response.status != 200 or first is None:
            found.errors += 1
        else:
            found.ttfts.append(first)


async def follow(client: aiohttp.ClientSession, url: str, one: Session, named: bool, found: Replay) -> None:
    """A session's turns, one after the other; its sub-agents run beside it."""
    async with asyncio.TaskGroup() as beside:
        for turn in one.turns:
            await ask(client, url, turn, one.name if named else None, found)
            for helper in turn.helpers:
                beside.create_task(follow(client, url, helper, named, found))
            await asyncio.sleep(turn.think_s)


async def replay(
    url: str, engines: Sequence[str], sessions: Sequence[Session], named: bool, seed: int
) -> Replay:
    """``named``: every request says which session it is of."""
    found = Replay()
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=headers) as client:
        for engine in engines:
            async with client.post(f"{engine}/reset_prefix_cache") as response:
                response.raise_for_status()
        before = await cache_counts(client, engines)
        rng = random.Random(seed)

        async def later(one: Session, wait_s: float) -> None:
            await asyncio.sleep(wait_s)
            await follow(client, url, one, named, found)

        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for one in sessions:
                group.create_task(later(one, rng.uniform(0, ARRIVE_S)))
        found.seconds = time.monotonic() - began
        after = await cache_counts(client, engines)
    found.hit_rate = (after["hits"] - before["hits"]) / (after["queries"] - before["queries"])
    return found


async def cache_counts(client: aiohttp.ClientSession, engines: Sequence[str]) -> dict[str, float]:
    """Tokens that were looked for in the engines' prefix caches, and those that were found."""
    counts = {"hits": 0.0, "queries": 0.0}
    for engine in engines:
        async with client.get(f"{engine}/metrics") as response:
            for name, value in _HITS.findall(await response.text()):
                counts[name] += float(value)
    return counts


def start_tiercel(policy: str, engines: Sequence[str]) -> tuple[subprocess.Popen[bytes], str]:
    port = free_port()
    model = {"path": str(ROOT / "deploy/assistant/model"), "serve": ["bf16"]}
    settings = {"models": {"assistant": model}, "pools": {"bf16": list(engines)}}
    command, ready = tiercel(port, 0, **settings, gateway={"port": port, "policy": policy})
    return _started(command, port, ready)


def start_router(policy: str, engines: Sequence[str]) -> tuple[subprocess.Popen[bytes], str]:
    python = environment("vllm-router", ("vllm-router==0.1.17", "uvloop", "aiohttp")) / "bin/python"
    port = free_port()
    command = [
        str(python), "-m", "vllm_router.launch_router", "--host", "127.0.0.1", "--port", str(port),
        "--worker-urls", *engines, "--policy", policy, "--log-level", "error",
        "--prometheus-port", str(free_port()),
    ]  # fmt: skip
    return _started(command, port, "/health")


def _started(command: list[str], port: int, ready: str) -> tuple[subprocess.Popen[bytes], str]:
    with (WORK / "placement.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
    url = f"http://127.0.0.1:{port}"
    wait_for(url + ready, process)
    return process, url


GATEWAYS = {
    "round_robin": partial(start_tiercel, "round_robin"),
    "session_affinity": partial(start_tiercel, "session_affinity"),
    "prefix_aware": partial(start_tiercel, "prefix_aware"),
    "vllm-router cache_aware": partial(start_router, "cache_aware"),
}


def engine(port: int, blocks: int) -> EngineProcess:
    """One whose cache has room for ``blocks`` blocks."""
    settings = EngineSettings(
        python=ROOT / ".venv-engine/bin/python",
        max_model_len=ROOM,
        max_num_seqs=16,
        extra_args=("--block-size", f"{TOKENS_PER_BLOCK}", "--num-gpu-blocks-override", f"{blocks}"),
        env={"OMP_NUM_THREADS": "1", "VLLM_SERVER_DEV_MODE": "1"},
    )
    model = ROOT / "deploy/assistant/model"
    card, log = variants()["assistant:bf16"], WORK / f"engine-{port}.log"
    return EngineProcess(EngineSpec(card, model, settings, port, log))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--sessions", type=int, default=48)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    every = [path.name.split(".")[0] for path in sorted(options.traces.glob("*.json.gz"))]
    names = tuple(name for name in every if name not in TUNED_ON)
    sessions = load(options.traces, names, options.sessions, options.turns, SCALE)
    blocks = len(working_set(sessions))
    infinite = simulate(sessions, RoundRobin(), 1, 10**9)["hit_rate"]
    WORK.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for share in (1.0, 0.25):
        # A running request needs its blocks too, and vLLM wants room for the longest one.
        room = max(ROOM // TOKENS_PER_BLOCK + 1, int(share * blocks)) + (blocks if share == 1.0 else 0)
        async with AsyncExitStack() as running:
            engines = [engine(free_port(), room) for _ in range(ENGINES)]
            for one in engines:
                running.push_async_callback(one.stop)
                await one.start()
            for one in engines:
                await one.wait_ready()
            urls = [one.spec.url for one in engines]
            for seed in range(options.rounds):
                for name in tqdm(GATEWAYS, desc=f"cache for {share:.0%}, round {seed + 1}"):
                    process, url = await asyncio.to_thread(GATEWAYS[name], urls)
                    try:
                        found = await replay(url, urls, sessions, name == "session_affinity", seed)
                    finally:
                        process.terminate()
                        process.wait(20)
                    ttfts = sorted(found.ttfts)
                    rows.append({
                        "gateway": name, "share": share, "seed": seed, "errors": found.errors,
                        "hits": found.hit_rate / infinite, "makespan_s": found.seconds,
                        "p50_s": statistics.median(ttfts), "p95_s": ttfts[int(0.95 * len(ttfts))],
                        "requests": len(ttfts),
                    })  # fmt: skip
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    (WORK / "placement.json").write_text(json.dumps(rows, indent=1))
    print(f"{', '.join(names)}: {rows[0]['requests']} requests, {blocks:,} blocks, infinite {infinite:.3f}\n")
    print(table(rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians with the least and the most, ratios to ``session_affinity`` of the same round."""
    lines = [
        "| gateway | cache each | hits ÷ infinite | p95 TTFT, s | p95 ÷ sticky | time ÷ sticky | errors |",
        "|---|---|---|---|---|---|---|",
    ]
    sticky = {(row["share"], row["seed"]): row for row in rows if row["gateway"] == "session_affinity"}
    for share in dict.fromkeys(row["share"] for row in rows):
        for name in GATEWAYS:
            mine = [row for row in rows if row["gateway"] == name and row["share"] == share]
            base = [sticky[share, row["seed"]] for row in mine]
            pairs = list(zip(mine, base, strict=True))
            cells = (
                [row["hits"] for row in mine],
                [row["p95_s"] for row in mine],
                [row["p95_s"] / other["p95_s"] for row, other in pairs],
                [row["makespan_s"] / other["makespan_s"] for row, other in pairs],
            )
            shown = [f"{statistics.median(c):.3g} ({min(c):.3g}–{max(c):.3g})" for c in cells]
            errors = sum(row["errors"] for row in mine)
            lines.append(f"| {name} | {share:.0%} | " + " | ".join(shown) + f" | {errors} |")
    return "\n".join(lines)


if __name__ == "__main__":
    asyncio.run(main())
