"""Hedges cut the slowest answers short; without a budget they would double the load of a slow-down."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.routing.hedging import BURST, Hedging
from gateway.telemetry.latencies import KEPT, MOST_KINDS, NEEDED, Latencies

CHAT = ("core", "int8", "/v1/chat/completions", False)


def test_a_hedge_waits_for_the_95th_percentile_of_its_kind() -> None:
    hedging = Hedging()
    streamed = (*CHAT[:3], True)
    for n in range(NEEDED - 1):
        hedging.seconds(CHAT, 10.0 + n / 100)
    assert hedging.delay(CHAT, 0.05) is None, "too few are known"
    for n in range(100):
        hedging.seconds(CHAT, 10.0)
        hedging.seconds(streamed, n / 100)
    assert hedging.delay(streamed, 0.05) == pytest.approx(0.95)
    assert hedging.delay(CHAT, 0.05) == pytest.approx(10, abs=0.2)
    assert hedging.delay(("core", "int8", "/v1/embeddings", False), 0.05) is None


@settings(deadline=None)
@given(
    st.integers(0, 5000),
    st.sampled_from([0.01, 0.05, 0.5, 1.0]),
    st.sampled_from([0.01, 0.5, 0.75]),
    st.randoms(use_true_random=True),  # one that Hypothesis draws takes 10 s over so many
)
def test_hedges_are_a_share_of_requests(requests: int, share: float, more: float, rng: random.Random) -> None:
    """However they are asked for, at any time: never more than the share, but for a small burst."""
    hedging = Hedging()
    hedges = 0
    for _ in range(requests):
        hedging.delay(CHAT, share)
        while rng.random() < more:
            hedges += hedging.allow()
    assert hedges <= BURST + share * requests + 1e-6


def test_all_of_a_budget_can_be_used() -> None:
    hedging = Hedging()
    hedges = 0
    for _ in range(1000):
        hedging.delay(CHAT, 0.05)
        hedges += hedging.allow()
    assert 50 <= hedges <= 50 + BURST


def test_a_share_of_nothing_is_no_hedge() -> None:
    hedging = Hedging()
    for _ in range(NEEDED):
        hedging.seconds(CHAT, 1.0)
    assert hedging.delay(CHAT, 0.05) == 1.0
    assert hedging.delay(CHAT, 0.0) is None


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=NEEDED, max_size=2 * KEPT))
def test_percentiles_are_of_the_last_answers(seconds: list[float]) -> None:
    latencies = Latencies()
    for one in seconds:
        latencies.add("kind", one)
    last = sorted(seconds[-KEPT:])
    assert latencies.p95("kind") == last[int(0.95 * len(last))]


def test_kinds_are_bounded_and_the_busiest_stay() -> None:
    latencies = Latencies()
    for n in range(3 * MOST_KINDS):
        latencies.add(n, 1.0)
        latencies.add("busy", 1.0)
    assert latencies.p95("busy") == 1.0
    for _ in range(NEEDED - 1):
        latencies.add(0, 1.0)
    assert latencies.p95(0) is None, "what it knew of the first kind has been forgotten"
