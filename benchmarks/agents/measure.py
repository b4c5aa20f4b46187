"""One arrangement, measured once: what AIPerf saw, what the engines counted, and what all of it took."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.agents.aiperf import Answered, replay, sessions_of
from benchmarks.agents.arrangements import Arrangement, Running, started
from benchmarks.agents.traces import AUXILIARY, CORE
from gateway.telemetry.engines import resident_bytes

WARM_UP_WORDS = 300
"""Of a prompt that no trace has, for each role: what an engine does once it has done then."""
OTHER_LENGTH = 0.2
"""Of the traces' tokens: words become other tokens where blocks meet, and the chat template adds some."""
Counts = dict[tuple[str, str], int]
"""Requests by role and variant."""


@dataclass(frozen=True)
class Workload:
    """What is replayed."""

    traces: Path
    sessions: int
    requests: int
    """Of all sessions."""
    prompt_tokens: int
    """Of all requests, as they were made."""
    at_once: int
    tokenizer: Path


@dataclass(frozen=True)
class Reading:
    """Counters and clocks at one moment; a difference of two says what happened between them."""

    hits: dict[str, float]
    asked: dict[str, float]
    """Prompt tokens looked for in the prefix caches, by variant; ``hits`` of them were there."""
    requests: dict[str, float]
    """Finished by an engine, by variant."""
    routed: Counts
    """As a gateway of ours counts them."""
    cpu_s: dict[str, float]


async def measured(one: Arrangement, user: Path, work: Workload, directory: Path) -> dict[str, Any]:
    """Start it, warm it up, replay, stop it."""
    async with started(one, user, directory) as running:
        await _warm_up(running.url)
        before = await _read(one, running)
        began = time.monotonic()
        answers = await replay(
            running.url, work.traces, directory / "aiperf", work.tokenizer, work.sessions, work.at_once
        )
        seconds = time.monotonic() - began
        after = await _read(one, running)
        memory = {
            variant: resident_bytes(engine.pid or 0) or 0 for variant, engine in running.engines.items()
        }
    found = summary(answers)
    served, doubt = _served(one, answers, before, after)
    if len(answers) != work.requests:
        doubt = f"{one.title}: {len(answers)} of {work.requests} requests were replayed"
    tokens = sum(answer.prompt_tokens for answer in answers)
    if abs(tokens / work.prompt_tokens - 1) > OTHER_LENGTH:
        doubt = f"{one.title}: {tokens} tokens were asked where traces have {work.prompt_tokens}"
    return {
        "arrangement": one.name,
        **found,
        **_between(before, after),
        "served": served,
        "doubt": doubt,
        "memory_bytes": memory,
        "replay_s": seconds,
    }


def summary(answers: Sequence[Answered]) -> dict[str, Any]:
    """Sessions per second and each role's times, seconds."""
    spans = sessions_of(answers)
    makespan = max(end for _, end in spans.values()) - min(began for began, _ in spans.values())
    lengths = [end - began for began, end in spans.values()]
    roles = {}
    for role in (CORE, AUXILIARY):
        mine = [one for one in answers if one.role == role]
        if mine:
            roles[role] = _role(mine)
    return {
        "sessions": len(spans),
        "makespan_s": makespan,
        "sessions_per_s": len(spans) / makespan,
        "session_s": {"p50": quantile(lengths, 0.5), "p95": quantile(lengths, 0.95)},
        "roles": roles,
    }


def _role(mine: Sequence[Answered]) -> dict[str, Any]:
    def times(values: Sequence[float]) -> dict[str, float]:
        ends = {"p50": quantile(values, 0.5), "p95": quantile(values, 0.95)}
        return {"mean": statistics.fmean(values), **ends}

    return {
        "requests": len(mine),
        "ttft_s": times([one.first_token_s for one in mine]),
        "total_s": times([one.seconds for one in mine]),
        "prompt_tokens": sum(one.prompt_tokens for one in mine),
        "cached_tokens": sum(one.cached_tokens for one in mine),
        "answer_tokens": sum(one.answer_tokens for one in mine),
    }


def quantile(values: Sequence[float], share: float) -> float:
    """The least value that so large a share of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


async def _warm_up(url: str) -> None:
    body = {"max_tokens": 8, "messages": [{"role": "user", "content": "one more time " * WARM_UP_WORDS}]}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as client:
        for role in (CORE, AUXILIARY, CORE, AUXILIARY):
            async with client.post(f"{url}/v1/chat/completions", json={**body, "model": role}) as response:
                if response.status != 200:
                    raise SystemExit(f"{role}: {response.status} {(await response.text())[:300]}")


async def _read(one: Arrangement, running: Running) -> Reading:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as client:
        texts = {}
        for variant, engine in running.engines.items():
            async with client.get(f"{engine.spec.url}/metrics") as response:
                texts[variant] = await response.text()
        routed: Counts = {}
        if one.door == "tiercel":
            async with client.get(f"{running.url}/metrics") as response:
                routed = routed_by(await response.text())
    return Reading(
        hits={name: _counter(text, "vllm:prefix_cache_hits_total") for name, text in texts.items()},
        asked={name: _counter(text, "vllm:prefix_cache_queries_total") for name, text in texts.items()},
        requests={name: _counter(text, "vllm:request_success_total") for name, text in texts.items()},
        routed=routed,
        cpu_s={name: sum(map(_cpu_s, pids)) for name, pids in running.processes().items()},
    )


def _counter(text: str, name: str) -> float:
    lines = [line for line in text.splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def routed_by(text: str) -> Counts:
    """Requests by role and variant, of a gateway's ``/metrics``."""
    found: Counts = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "tiercel_requests_total":
                key = sample.labels["role"], sample.labels["variant"].rpartition(":")[2]
                found[key] = found.get(key, 0) + int(sample.value)
    return found


def _cpu_s(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _between(before: Reading, after: Reading) -> dict[str, Any]:
    asked = sum(after.asked.values()) - sum(before.asked.values())
    hits = sum(after.hits.values()) - sum(before.hits.values())
    return {
        "cache_hit_rate": hits / asked if asked else 0.0,
        "cpu_s": {name: after.cpu_s[name] - before.cpu_s[name] for name in after.cpu_s},
    }


def _served(
    one: Arrangement, answers: Sequence[Answered], before: Reading, after: Reading
) -> tuple[Mapping[str, dict[str, int]], str]:
    """Answers by role and variant, and a sentence where the engines' own counts do not bear that out. Where
    no gateway of ours counts them it is the rule's word."""
    if one.serves is None:
        counts = {key: after.routed[key] - before.routed.get(key, 0) for key in after.routed}
    else:
        counts = {}
        for answer in answers:
            key = answer.role, one.serves[answer.role]
            counts[key] = counts.get(key, 0) + 1
    expected: dict[str, int] = {}
    found: dict[str, dict[str, int]] = {}
    for (role, variant), count in counts.items():
        if count:
            found.setdefault(role, {})[variant] = count
            expected[variant] = expected.get(variant, 0) + count
    seen = {name: round(after.requests[name] - before.requests[name]) for name in after.requests}
    if expected == {name: count for name, count in seen.items() if count}:
        return found, ""
    return found, f"{one.title}: {expected} answers were expected of the engines, which gave {seen}"
