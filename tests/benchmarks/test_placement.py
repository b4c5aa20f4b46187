"""The simulation of placement: its cache is vLLM's, and the policy does in it what it is for."""

from __future__ import annotations

import random

import pytest

from benchmarks.gateway.placement import Session, Turn, simulate, spread
from gateway.routing.policies import POLICIES, PrefixAware


def sessions(count: int, turns: int) -> list[Session]:
    """Conversations with a common beginning of ten blocks that grow by five."""
    made = []
    for n in range(count):
        blocks = [("common", block) for block in range(10)] + [(n, block) for block in range(5 * turns)]
        chain = tuple(map(hash, blocks))
        made.append(Session(str(n), [Turn(chain[: 15 + 5 * t], 5, 0.1) for t in range(turns)]))
    return made


def test_an_infinite_cache_computes_every_block_once() -> None:
    found = simulate(sessions(6, 4), POLICIES["round_robin"](), replicas=1, capacity=10**6)
    asked = 6 * sum(15 + 5 * turn for turn in range(4))
    once = 10 + 6 * 20
    assert found["hit_rate"] == pytest.approx(1 - once / asked)
    assert found["requests"] == 24


def test_a_cache_of_one_block_hits_the_first_block_at_most() -> None:
    found = simulate(sessions(3, 3), POLICIES["round_robin"](), replicas=2, capacity=1)
    assert found["hit_rate"] <= 9 / (3 * (15 + 20 + 25))


def test_prefix_aware_hits_like_sessions_that_stay() -> None:
    conversations = sessions(24, 6)
    sticky = simulate(conversations, POLICIES["session_affinity"](), replicas=4, capacity=10**6)
    aware = simulate(conversations, PrefixAware(rng=random.Random(1)), replicas=4, capacity=10**6)
    blind = simulate(conversations, POLICIES["round_robin"](), replicas=4, capacity=10**6)
    assert aware["hit_rate"] > sticky["hit_rate"] - 0.03
    assert aware["hit_rate"] > blind["hit_rate"] + 0.1
    assert aware["imbalance"] < sticky["imbalance"] + 0.3


@pytest.mark.parametrize("apart_s", [0.0, 0.05, 1.0])
def test_new_sessions_with_a_common_prompt_spread(apart_s: float) -> None:
    found = [spread(PrefixAware(rng=random.Random(seed)), seed, apart_s) for seed in range(9)]
    assert all(least >= 2 and most <= 6 for least, *_, most in found), found
    even = sum(least >= 3 and most <= 5 for least, *_, most in found)
    assert even >= 6, found
