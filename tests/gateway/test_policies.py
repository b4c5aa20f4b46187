"""Which replica of a pool: a mistake here computes prompts anew that another replica has in its cache."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import POLICIES as POLICY_NAMES
from gateway.routing import policies
from gateway.routing.policies import (
    MOST_PLACES,
    POLICIES,
    LeastInFlight,
    LeastLoad,
    PickQuery,
    PrefixAware,
    RoundRobin,
    SessionAffinity,
)
from gateway.routing.prefixes import (
    BLOCK_BYTES,
    GROWTH,
    MOST_BLOCKS,
    CacheIndex,
    Chain,
    SharedBeginnings,
    block_chain,
)
from gateway.routing.replicas import Reading, Replica


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def replicas(count: int) -> list[Replica]:
    variant = "assistant:int8"
    return [Replica(variant, f"{variant}-{n}", f"http://127.0.0.1:{n + 1}", Clock()) for n in range(count)]


def query(
    prompt: bytes = b"", session: str | None = None, salt: str = "", parent: str | None = None
) -> PickQuery:
    return PickQuery(session, salt, lambda: [prompt], parent=parent)


def test_policies_have_names() -> None:
    assert tuple(POLICIES) == POLICY_NAMES


def test_round_robin() -> None:
    policy, three = RoundRobin(), replicas(3)
    assert [policy.pick(three, query())[0].name for _ in range(6)] == [
        "assistant:int8-0",
        "assistant:int8-1",
        "assistant:int8-2",
    ] * 2


def test_least_in_flight_then_in_turn() -> None:
    policy, three = LeastInFlight(), replicas(3)
    assert Counter(policy.pick(three, query())[0].name for _ in range(6)) == {
        f"assistant:int8-{n}": 2 for n in range(3)
    }
    three[0].take()
    three[2].take()
    assert {policy.pick(three, query())[0].name for _ in range(6)} == {"assistant:int8-1"}
    assert {policy.pick([three[0], three[2]], query())[0].name for _ in range(6)} == {
        "assistant:int8-0",
        "assistant:int8-2",
    }


def test_least_load_counts_what_others_sent_and_falls_back() -> None:
    policy, two = LeastLoad(), replicas(2)
    two[0].take()
    assert policy.pick(two, query())[0] is two[1], "no readings: our own requests count"
    two[0].read(Reading(running=0, waiting=0, at=Clock.now))
    two[1].read(Reading(running=3, waiting=1, at=Clock.now))
    assert policy.pick(two, query())[0] is two[0]
    for _ in range(5):
        two[0].take()
    assert policy.pick(two, query())[0] is two[1], "what was sent since the reading counts"
    two[1].read(Reading(running=0, waiting=0, at=Clock.now - 60))
    assert policy.pick(two, query())[0] is two[1], "an old reading counts for nothing"


def test_sessions_stay_and_only_those_of_a_lost_replica_move() -> None:
    policy, four = SessionAffinity(), replicas(4)
    sessions = [f"s{n}" for n in range(400)]
    before = {s: policy.pick(four, query(session=s))[0] for s in sessions}
    assert {policy.pick(four, query(session=s))[0] for s in ["s1"] * 5} == {before["s1"]}
    assert all(60 < count < 140 for count in Counter(r.name for r in before.values()).values())
    after = {s: policy.pick(four[:3], query(session=s))[0] for s in sessions}
    assert all(after[s] is before[s] for s in sessions if before[s] is not four[3])


def test_what_an_agent_has_started_is_where_the_agent_is() -> None:
    policy, four = SessionAffinity(), replicas(4)
    for n in range(40):
        home = policy.pick(four, query(session=f"s{n}"))[0]
        assert policy.pick(four, query(session=f"s{n}/a", parent=f"s{n}"))[0] is home


def test_what_a_sub_agent_has_started_is_where_the_first_agent_is() -> None:
    policy, four = SessionAffinity(), replicas(4)
    for n in range(40):
        home = policy.pick(four, query(session=f"s{n}"))[0]
        for session, parent in (("a", f"s{n}"), ("b", "a"), ("c", "b")):
            own, above = f"{n}.{session}", parent if parent == f"s{n}" else f"{n}.{parent}"
            assert policy.pick(four, query(session=own, parent=above))[0] is home
            assert policy.pick(four, query(session=own))[0] is home, "also where it says its parent no more"
        assert policy.pick(four, query(parent=f"{n}.c"))[0] is home, "and what has no session of its own"


def test_who_started_whom_is_a_tenants_own_and_no_circle_matters() -> None:
    policy, four = SessionAffinity(), replicas(4)
    homes = {name: policy.pick(four, query(session=name))[0] for name in ("own", "other", "child")}
    policy.pick(four, query(salt="one", session="child", parent="own"))
    assert policy.pick(four, query(salt="two", session="child"))[0] is homes["child"]
    assert policy.pick(four, query(salt="two", session="of it", parent="child"))[0] is homes["child"]
    for _ in range(3):  # each says that the other one has started it
        policy.pick(four, query(session="own", parent="other"))
        policy.pick(four, query(session="other", parent="own"))
    assert policy.pick(four, query(session="own", parent="own"))[0] in four


def test_sessions_that_others_have_started_are_forgotten_when_there_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(policies, "MOST_PLACES", 8)
    policy, four = SessionAffinity(), replicas(4)
    for n in range(100):
        policy.pick(four, query(session=f"a{n}", parent=f"s{n}"))
    assert len(policy._firsts) == 8
    home = policy.pick(four, query(session="s99"))[0]
    assert policy.pick(four, query(session="b", parent="a99"))[0] is home, "the newest are known"


def conversation(seed: int, turns: int, system: bytes = b"") -> list[bytes]:
    """Prompts of a conversation, each of which begins with the one before."""
    rng = random.Random(seed)
    prompts, prompt = [], system
    for _ in range(turns):
        prompt += rng.randbytes(2000).hex().encode()
        prompts.append(prompt)
    return prompts


def test_prefix_aware_keeps_a_conversation_where_its_cache_is() -> None:
    policy, four = PrefixAware(), replicas(4)
    homes = []
    for seed in range(8):
        picked = [policy.pick(four, query(prompt))[0] for prompt in conversation(seed, 5)]
        assert len(set(picked)) == 1
        homes.append(picked[0])
    first, work = policy.pick(four, query(conversation(0, 6)[-1]))
    assert first is homes[0]
    assert work == pytest.approx(4000 / BLOCK_BYTES, abs=1), "only the new turn is work"


def test_prefix_aware_begins_a_sub_agent_near_its_parent_where_nothing_speaks_against_it() -> None:
    for seed in range(20):
        policy, four = PrefixAware(rng=random.Random(seed)), replicas(4)
        prompts = [conversation(10 * seed + n, 1)[0] for n in range(5)]
        home, _ = policy.pick(four, query(prompts[0], "root"))
        first, work = policy.pick(four, query(prompts[1], "root/1", parent="root"))
        assert first is home
        first.take(work)
        second, _ = policy.pick(four, query(prompts[2], "root/2", parent="root"))
        assert second is not home, "work that is queued there counts for more"


def test_prefix_aware_takes_no_other_tenants_word_for_a_parent() -> None:
    at_home = 0
    for seed in range(200):
        policy, four = PrefixAware(rng=random.Random(seed)), replicas(4)
        home, _ = policy.pick(four, query(conversation(seed, 1)[0], "root", "a"))
        found, _ = policy.pick(four, query(conversation(-seed - 1, 1)[0], "x", "b", parent="root"))
        at_home += found is home
    assert at_home < 100


def test_prefix_aware_forgets_the_oldest_places() -> None:
    policy, two = PrefixAware(), replicas(2)
    for n in range(MOST_PLACES + 10):
        policy.pick(two, query(b"", f"s{n}"))
    assert len(policy._places) == MOST_PLACES
    assert ("", "s0") not in policy._places
    assert ("", f"s{MOST_PLACES + 9}") in policy._places


def test_prefix_aware_spreads_new_sessions_that_share_a_prompt() -> None:
    """A shared system prompt makes every new session look like a match; they must not pile up there."""
    policy, four = PrefixAware(), replicas(4)
    system = random.Random(0).randbytes(3000).hex().encode()
    homes = Counter()
    for seed in range(16):
        replica, work = policy.pick(four, query(conversation(seed, 1, system)[0]))
        replica.take(work)
        homes[replica.name] += 1
    assert all(3 <= homes[replica.name] <= 5 for replica in four), homes


def test_prefix_aware_keeps_tenants_apart() -> None:
    prompt = conversation(1, 1)[0]
    assert not set(block_chain([prompt], "a").hashes) & set(block_chain([prompt], "b").hashes)
    assert block_chain([prompt], "a").hashes == block_chain([prompt], "a").hashes


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), max_size=40), st.integers(1, 12))
def test_an_index_is_what_a_cache_of_that_size_holds(chains: list[list[int]], capacity: int) -> None:
    """Against a plain model: the most recently used blocks, an earlier block counting as used later."""
    index, model = CacheIndex(), []
    for path in chains:
        hashes = [hash(tuple(path[: n + 1])) for n in range(len(path))]
        ends = [BLOCK_BYTES * (n + 1) for n in range(len(path))]
        chain = Chain(hashes, ends)
        expected = next((n for n, block in enumerate(hashes) if block not in model), len(hashes))
        assert index.cached(chain) == expected * BLOCK_BYTES
        index.add(chain, capacity * BLOCK_BYTES)
        for block in reversed(hashes):
            if block in model:
                model.remove(block)
            model.append(block)
        model = model[-capacity:]
        assert len(index) == len(model)


@settings(deadline=None)
@given(
    st.lists(st.binary(max_size=5000), min_size=1, max_size=3),
    st.integers(0, 200_000),
    st.integers(1, 20_000),
)
def test_a_prompt_that_goes_on_has_the_chain_of_the_one_before(
    parts: list[bytes], longer: int, more: int
) -> None:
    """However a prompt grows, what it began with is found again: all of it but the last, unfinished block."""
    parts[-1] += random.Random(longer).randbytes(longer)
    short = block_chain(parts)
    long = block_chain([*parts[:-1], parts[-1] + random.Random(more).randbytes(more)])
    assert short.ends == sorted(set(short.ends))
    assert 0 <= sum(map(len, parts)) - short.size < max(BLOCK_BYTES, sum(map(len, parts)) / GROWTH)
    same = [n for n, (a, b) in enumerate(zip(short.hashes, long.hashes, strict=False)) if a == b]
    assert same == list(range(len(same)))
    unfinished = len(parts[-1]) < BLOCK_BYTES  # a single block that is not finished is a block of its own
    assert len(same) >= len(short.hashes) - unfinished
    index = CacheIndex()
    index.add(short, 1 << 30)
    assert index.cached(short) == short.size
    if not unfinished:
        assert index.cached(long) == short.size


def test_a_difference_anywhere_is_seen() -> None:
    """Other text of another length, or of the same length and longer than the windows are apart."""
    rng = random.Random(0)
    prompt = rng.randbytes(300_000)
    chain = block_chain([prompt])
    for at in (0, 100, 5_000, 31_000, 120_000, 250_000):
        for changed in (
            prompt[:at] + b"x" + prompt[at:],
            prompt[:at] + rng.randbytes(60_000) + prompt[at + 60_000 :],
        ):
            other = block_chain([changed])
            same = sum(a == b for a, b in zip(chain.hashes, other.hashes, strict=False))
            before = sum(end <= at for end in chain.ends)
            assert before <= same <= before + 1
    assert block_chain([b"tools", b"messages"]).hashes != block_chain([b"tool", b"smessages"]).hashes


def test_what_a_chain_costs_is_bounded() -> None:
    """Blocks, of which each is hashed in at most two windows or within the first bytes."""
    for size, most in ((1_000, 2), (16_000, 30), (200_000, 70), (4_000_000, 120), (64_000_000, 170)):
        assert len(block_chain([bytes(size)]).hashes) <= most, size


def test_what_is_remembered_of_a_replica_is_bounded() -> None:
    index, beginnings = CacheIndex(), SharedBeginnings()
    system = random.Random(0).randbytes(2_000)
    for seed in range(2_500):
        chain = block_chain([system + random.Random(seed).randbytes(8_000)])
        beginnings.shared(chain)
        index.add(chain, 1 << 40)
    assert len(index) <= MOST_BLOCKS
    assert len(beginnings) <= MOST_BLOCKS
    assert index.cached(chain) == chain.size
    assert 1_000 < beginnings.shared(block_chain([system + b"another" * 1_000])) <= 2_000, (
        "what prompts keep beginning with is not what is forgotten"
    )
    index.add(chain, 1_000)
    assert index.cached(chain) <= 1_000
