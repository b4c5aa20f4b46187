"""What ``/metrics`` says, and what it costs the event loop."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from typing import Any

import pytest
from gateway_stack import running_gateway
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gateway.telemetry import exposition
from gateway.telemetry.counters import Counter, CounterFamily, GaugeFamily, Histogram, HistogramFamily
from gateway.telemetry.exposition import Exposition
from gateway.telemetry.metrics import Metrics

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    """By name and labels, without what is measured anew each time."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.startswith("process_")
    }


def filled(roles: int) -> Metrics:
    """Metrics that have all children of so many roles with three variants each."""
    metrics = Metrics(CollectorRegistry(), ())
    values = {
        "role": [f"role_{n}" for n in range(roles)],
        "variant": ["bf16", "int8", "int4-kv8"],
        "check": ["shadow", "rules", "signals"],
        "outcome": ["200", "400", "503"],
        "kind": ["prompt", "completion"],
    }
    for family in metrics.families.values():
        for labels in itertools.product(*(values.get(name, ["one"]) for name in family.label_names)):
            child = family.labels(*labels)
            if isinstance(child, Histogram):
                child.observe(0.02)
                child.observe(1e9)
            elif isinstance(child, Counter):
                child.inc(3)
            else:
                child.set(1.5)
    return metrics


def test_the_text_says_what_prometheus_client_would() -> None:
    metrics = filled(roles=3)
    registry = metrics.registry
    odd = 'a "quoted"\\ name\nof two lines'
    CounterFamily("odd_total", "A \\ text\nof two lines", ("b", "a"), registry).labels(odd, "x").inc(0.1)
    gauge = GaugeFamily("strange", "", ("a",), registry)
    for name, value in (("nan", math.nan), ("inf", math.inf), ("minus", -math.inf), ("large", 1e300)):
        gauge.labels(name).set(value)
    HistogramFamily("plain", "Without labels", (0.5, 1), (), registry).labels().observe(0.7)
    families = {one.name: one for one in registry._collector_to_names if hasattr(one, "children")}
    written = Exposition(families, registry).write().decode()
    mine, theirs = samples(written), samples(generate_latest(registry).decode())
    assert mine.keys() == theirs.keys()
    assert len(mine) > 500
    for key, value in theirs.items():
        assert mine[key] == value or (math.isnan(value) and math.isnan(mine[key])), key
    assert "process_open_fds " in written, "what is registered beside ours is there too"
    kinds = {line for line in written.splitlines() if line.startswith("# TYPE")}
    assert "# TYPE tiercel_requests_total counter" in kinds
    assert "# TYPE plain histogram" in kinds


def test_a_hundred_roles_hold_the_lock_for_a_few_milliseconds_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    metrics = filled(roles=100)
    shown = Exposition(metrics.families, metrics.registry)
    held: list[float] = []
    longest: list[float] = []
    since = 0.0

    class Time:
        """Measures processor time, which another process takes nothing of."""

        @staticmethod
        def sleep(_: float) -> None:
            nonlocal since
            held.append(time.thread_time() - since)
            since = time.thread_time()

    monkeypatch.setattr(exposition, "time", Time)
    for _ in range(3):
        held.clear()
        since = time.thread_time()
        text = shown.write()
        held.append(time.thread_time() - since)
        longest.append(max(held))
    assert text.count(b"\n") > 40_000
    # Of three, since a machine may stop for a moment and count it.
    assert min(longest) < 0.02, f"{1000 * min(longest):.1f} ms"


async def test_two_who_ask_at_once_get_one_text() -> None:
    metrics = filled(roles=10)
    shown = Exposition(metrics.families, metrics.registry)
    first, second = await asyncio.gather(shown.text(), shown.text())
    assert first is second
    assert shown.written == 1
    leaving = asyncio.create_task(shown.text())
    staying = asyncio.create_task(shown.text())
    await asyncio.sleep(0)
    leaving.cancel()
    assert await staying
    assert shown.written == 2
    await shown.text()
    assert shown.written == 3, "a later one is new"


async def test_the_text_is_written_in_a_thread_while_requests_are_counted() -> None:
    async with running_gateway() as stack:
        stop = False

        async def read() -> list[float]:
            seen = []
            while not stop:
                async with stack.http.get(stack.url + "/metrics") as response:
                    found = samples(await response.text())
                seen.append(sum(v for (name, _), v in found.items() if name == "tiercel_requests_total"))
            return seen

        async def ask(role: str) -> Any:
            async with stack.post(headers={"x-agent-role": role}) as response:
                return await response.read()

        reading = asyncio.create_task(read())
        for _ in range(10):
            await asyncio.gather(*(ask(role) for role in ("core", "summarizer", "intent_classifier")))
        stop = True
        seen = await reading
        assert seen == sorted(seen)
        assert stack.requests("200") >= 30
