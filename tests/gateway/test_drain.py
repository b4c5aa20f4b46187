"""A gateway that ends has its last answers looked at as long as there is time, and counts the rest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from gateway_stack import make_cards, make_config, running_gateway
from prometheus_client import CollectorRegistry
from test_quality_process import SLOW_S, ask, outcome, ready, record, running

from gateway import app
from gateway.app import Gateway
from gateway.quality import process
from gateway.quality.process import CheckProcess, LostError
from gateway.quality.records import Look, Step
from gateway.telemetry.metrics import Metrics


def dropped(metrics: Metrics, reason: str) -> float:
    return metrics.registry.get_sample_value("tiercel_quality_dropped_total", {"reason": reason}) or 0.0


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that cannot go on while the block lasts."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_what_waits_is_looked_at_before_a_gateway_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as there is time, a full queue as well."""
    monkeypatch.setattr(process, "MOST_WAITING", 2)
    found: list[Step | None] = []
    async with running() as (checks, metrics):
        with stopped(await ready(checks)):
            for _ in range(3):  # one is with the process
                assert checks.submit(Look(), record(), found.append, limit_s=SLOW_S)
            draining = asyncio.create_task(checks.drain(SLOW_S))
            await asyncio.sleep(0)
            assert not draining.done()
        await draining
        assert [step is not None and step.findings is not None for step in found] == [True] * 3
        assert dropped(metrics, "stopping") == 0


async def test_what_cannot_be_looked_at_before_a_gateway_ends_is_dropped_and_counted() -> None:
    found: list[Step | None] = []
    async with running() as (checks, metrics):
        with stopped(await ready(checks)):
            for _ in range(3):
                assert checks.submit(Look(), record(), found.append, limit_s=SLOW_S)
            asked = asyncio.create_task(checks.step(Look(), record(), limit_s=SLOW_S))
            kept: list[Step | None] = []
            assert checks.submit(Look(), record(), kept.append, limit_s=SLOW_S, counted=False)
            await asyncio.sleep(0)
            async with asyncio.timeout(SLOW_S):
                await checks.drain(0.01)
            assert dropped(metrics, "stopping") == 3
            with pytest.raises(LostError):
                await asked
            assert kept == [None], "who counts by himself is told"
            assert checks.submit(Look(), record(), found.append) is None, "nothing more is taken"
            assert dropped(metrics, "stopping") == 4
            with pytest.raises(LostError):
                await checks.step(Look(), record())
            async with asyncio.timeout(SLOW_S):
                await checks.drain(SLOW_S)
        assert found == [], "nobody is told of what is counted already"


async def test_the_end_of_a_gateway_leaves_its_checks_the_time_to_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What requests have left of it, and two seconds where they have taken all."""
    given: list[float] = []

    async def drain(_: CheckProcess, within_s: float) -> None:
        given.append(within_s)

    monkeypatch.setattr(CheckProcess, "drain", drain)
    gateway = Gateway(make_config(gateway={"shutdown_timeout_s": 20}), make_cards(), CollectorRegistry())
    monkeypatch.setattr(app, "time", SimpleNamespace(monotonic=lambda: 100.0))
    for since in (None, 95.0, 70.0):
        gateway.stopping_since = since
        await gateway._finish()
    assert given == [20.0, 15.0, app.LEAST_DRAIN_S]


async def test_answers_that_a_gateway_has_no_time_for_are_no_errors() -> None:
    async with running_gateway() as stack:
        with stopped(await ready(stack.gateway.checks)):
            await ask(stack, 3)
            await stack.gateway.plane.close(0.01)
        assert stack.sample("tiercel_quality_dropped_total", reason="stopping") == 3
        assert outcome(stack, "rules", "error") == outcome(stack, "empty", "passed") == 0
