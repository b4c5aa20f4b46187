"""Outcomes folded into the store: gates, and clocks that are not the folding process's own."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway_stack import make_cards, make_config
from prometheus_client import CollectorRegistry

from gateway.quality.cells import CellKey, EventKind, Outcome, Status
from gateway.quality.folding import fold
from gateway.quality.rates import Watched
from gateway.quality.store import Store
from gateway.quality.watch import Watch
from gateway.telemetry.metrics import Metrics

NOW = 1_700_000_000.0
VARIANT, ROLE = "assistant:int4-kv8", "intent_classifier"


@pytest.fixture
def watched() -> Watched:
    return Watched.of(make_config(), make_cards())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(f"sqlite:///{tmp_path / 'watch.db'}", "here")
    yield made
    made.close()


def key(watched: Watched) -> CellKey:
    return watched.keys[VARIANT, ROLE]


def harm(of: CellKey, at: float) -> list[Outcome]:
    """What two checks agree about."""
    return [Outcome(of, check, True, at) for check in ("rules", "shadow") for _ in range(15)]


def folded(store: Store, watched: Watched, outcomes: list[Outcome], now: float) -> list[EventKind]:
    _, beats = store.lead(-1, False)
    return [event.kind for event in fold(store, outcomes, watched, now, beats)]


def test_a_gate_passed_before_the_harm_does_not_undo_its_demotion(store: Store, watched: Watched) -> None:
    of = key(watched)
    folded(store, watched, [Outcome(of, "rules", False, NOW)], NOW)
    anew = dataclasses.replace(watched, gates={**watched.gates, VARIANT: "another"})
    folded(store, anew, [Outcome(of, "rules", False, NOW)], NOW)
    assert EventKind.DEMOTED in folded(store, anew, harm(of, NOW), NOW)
    assert folded(store, anew, [], NOW + 1) == []
    assert store.cells()[of].status is Status.DEMOTED
    later = dataclasses.replace(watched, gates={**watched.gates, VARIANT: "a third"})
    assert folded(store, later, [], NOW + 2) == [EventKind.RESTORED]


@pytest.mark.parametrize("ahead", [-86_400.0, 86_400.0])
def test_clocks_of_two_machines_are_not_compared(store: Store, watched: Watched, ahead: float) -> None:
    """Another gateway saw the harm, and its clock is a day off: probation is due when it would be."""
    of, wait = key(watched), watched.policies[key(watched)].probation_after_s
    assert EventKind.DEMOTED in folded(store, watched, harm(of, NOW + ahead), NOW)
    assert store.cells()[of].since == NOW
    assert store.events()[0].at == NOW
    assert folded(store, watched, [], NOW + wait - 1) == []
    assert folded(store, watched, [], NOW + wait + 1) == [EventKind.PROBATION]


def test_a_clock_that_was_ahead_is_set_back(store: Store, watched: Watched) -> None:
    """A machine began with a wrong clock. Neither probation nor the limit waits until that time."""
    of, wait = key(watched), watched.policies[key(watched)].probation_after_s
    future = NOW + 10 * 365 * 86_400
    assert EventKind.DEMOTED in folded(store, watched, harm(of, future), future)
    folded(store, watched, [], NOW)
    assert folded(store, watched, [], NOW + wait + 1) == [EventKind.PROBATION]
    other = next(one for (_, role), one in watched.keys.items() if role != ROLE)
    assert EventKind.DEMOTED in folded(store, watched, harm(other, NOW), NOW)


async def test_a_value_that_is_no_number_does_not_reach_the_store(tmp_path: Path) -> None:
    """An engine said NaN of its KV cache: cells that held it could not be read again."""
    config = make_config(run_dir=tmp_path)
    watch = Watch(config, make_cards(), Metrics(CollectorRegistry(), config.roles), lambda _: None)
    running = asyncio.create_task(watch.run())
    for value in (float("nan"), float("inf"), 0.5):
        watch.note_engine(VARIANT, None, value, None)
    async with asyncio.timeout(20):
        while not (cells := (await watch.report())["cells"]) or cells[0]["role"] != "(engine)":
            await asyncio.sleep(0.05)
    assert cells[0]["checks"]["kv_cache"]["learning"] == 1
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
