"""What the engines say about themselves, read in the background. A reading that fails is left out."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from gateway.routing.breaker import Clock
from gateway.routing.replicas import Reading, Replica
from gateway.telemetry.metrics import Metrics
from gateway.upstream.whole import read_whole

SCRAPE_TIMEOUT_S = 5.0
LONGEST_BYTES = 4 << 20
"""Of an engine's metrics: a rank has about a hundred thousand."""
MOST_LINES = 2048
"""Of these that are parsed, 10 us each: an engine says eight for each of its ranks."""
MEMORY_EVERY_S = 10.0
"""A local engine's memory is read less often: all its pages are walked for it, 76 ms for 2.5 GB."""
ENGINES_FILE = "engines.json"
_CACHE = "vllm:cache_config_info"
_LORA = "vllm:lora_requests_info"
_FIGURES = (
    "vllm:kv_cache_usage_perc",
    "vllm:num_requests_waiting",
    "vllm:num_requests_running",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
)
_READ = (*_FIGURES, _CACHE, _LORA)


def parse_reading(text: str) -> Reading:
    """Read vLLM 0.32's metrics. Data-parallel ranks of one engine: the fullest cache, summed requests.

    Raises ValueError for what is not Prometheus text.
    """
    # An engine says hundreds of lines, and eight are read: parsing all was most of an idle gateway's work.
    lines = text.splitlines()
    lines = ([line for line in lines if line.startswith(_READ)] or lines)[:MOST_LINES]
    found: dict[str, list[float]] = {}
    cache_tokens = adapters = None
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            if math.isfinite(sample.value):
                found.setdefault(sample.name, []).append(sample.value)
            if sample.name == _CACHE:
                cache_tokens = _cache_tokens(sample.labels)
            if sample.name == _LORA and sample.labels.get("max_lora", "").isdigit():
                adapters = int(sample.labels["max_lora"])
    usage, waiting, running, preempted, read, written = map(found.get, _FIGURES)
    return Reading(
        kv_cache_usage=max(usage) if usage else None,
        waiting=sum(waiting) if waiting else None,
        running=sum(running) if running else None,
        preemptions=sum(preempted) if preempted else None,
        prompt_tokens=sum(read) if read else None,
        generation_tokens=sum(written) if written else None,
        cache_tokens=cache_tokens,
        adapters=adapters,
    )


def _cache_tokens(labels: Mapping[str, str]) -> int | None:
    try:
        return int(labels["num_gpu_blocks"]) * int(labels["block_size"])
    except (KeyError, ValueError):
        return None


def engine_pids(run_dir: Path) -> dict[tuple[str, str], int]:
    """Process ids of locally started engines by (``model:variant``, base URL), as their supervisor wrote
    them."""
    try:
        engines = json.loads((run_dir / ENGINES_FILE).read_text(encoding="utf-8"))["engines"]
        return {(name, engine["url"].rstrip("/")): int(engine["pid"]) for name, engine in engines.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def resident_bytes(pid: int) -> int | None:
    """Memory of a process and its descendants, pages that they share counted once between them.

    That is Linux's proportional set size; where it cannot be read, resident memory.
    """
    try:
        process = psutil.Process(pid)
        tree = [process, *process.children(recursive=True)]
    except psutil.Error:
        return None
    total = 0
    for member in tree:
        try:
            total += getattr(member.memory_full_info(), "pss", 0) or member.memory_info().rss
        except psutil.Error:
            continue
    return total or None


class EngineReader:
    """Keeps the gauges of all engines up to date."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        metrics: Metrics,
        run_dir: Path,
        clock: Clock,
        seen: Callable[[str, float | None, float | None, float | None], None] | None = None,
    ) -> None:
        """``seen`` is told every engine's ``model:variant``, memory (bytes), share of the KV cache in use,
        and requests that were thrown out of it since the reading before."""
        self._seen = seen
        self._session = session
        self._metrics = metrics
        self._run_dir = run_dir
        self._clock = clock
        self._memory: dict[int, tuple[float, int | None]] = {}
        """By process: when it was read, and what was found."""

    async def read(self, replicas: Callable[[], Iterable[Replica]]) -> None:
        """Read all of ``replicas()``, which may change meanwhile, once. Raises what
        reading one of them has raised, when all have been read."""
        pids = engine_pids(self._run_dir)
        self._memory = {pid: read for pid, read in self._memory.items() if pid in pids.values()}
        asked = list(replicas())
        reading = (self._read(replica, pids.get((replica.variant, replica.url))) for replica in asked)
        failed = [one for one in await asyncio.gather(*reading, return_exceptions=True) if one is not None]
        left = set(asked) - set(replicas())  # a replica may go while it is being asked
        self._metrics.forget((*replica.labels, replica.name) for replica in left)
        if failed:
            raise failed[0]

    async def _read(self, replica: Replica, pid: int | None) -> None:
        timeout = aiohttp.ClientTimeout(total=SCRAPE_TIMEOUT_S)
        try:
            async with self._session.get(
                replica.base + "/metrics", headers=replica.credentials, timeout=timeout, allow_redirects=False
            ) as response:
                said = await read_whole(response, LONGEST_BYTES) if response.status == 200 else b""
                reading = parse_reading(said.decode(errors="replace"))
        except (aiohttp.ClientError, TimeoutError, ValueError):
            reading = Reading()
        before, now = replica.reading.preemptions, reading.preemptions
        preempted = None if before is None or now is None else max(0.0, now - before)
        replica.read(dataclasses.replace(reading, at=self._clock()))
        memory, anew = await self._memory_of(pid)
        if self._seen is not None:
            self._seen(replica.variant, memory if anew else None, reading.kv_cache_usage, preempted)
        labels = (*replica.labels, replica.name)
        self._metrics.engine_read.labels(*labels).set(reading.waiting is not None)
        for gauge, value in (
            (self._metrics.reachable, replica.reachable),
            (self._metrics.kv_cache_usage, reading.kv_cache_usage),
            (self._metrics.queue_depth, reading.waiting),
            (self._metrics.engine_memory, memory),
        ):
            if value is None:  # an old figure would pass for a present one
                gauge.remove(*labels)
            else:
                gauge.labels(*labels).set(value)

    async def _memory_of(self, pid: int | None) -> tuple[int | None, bool]:
        """A local engine's memory, bytes, and whether it was read just now."""
        if pid is None:
            return None, False
        at, memory = self._memory.get(pid, (-MEMORY_EVERY_S, None))
        if (now := self._clock()) - at < MEMORY_EVERY_S:
            return memory, False
        self._memory[pid] = now, None  # its other replicas need not read it as well
        memory = await asyncio.to_thread(resident_bytes, pid)
        self._memory[pid] = now, memory
        return memory, True
