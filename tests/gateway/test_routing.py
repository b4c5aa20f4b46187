"""Which variant serves whom. A mistake here serves a core agent at four bits, or pays for sixteen."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from gateway_stack import make_card, make_cards, make_config
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import POLICIES as POLICY_NAMES
from gateway.config import ApiKey, ConfigError
from gateway.errors import NoReplicaError, PrecisionTooLowError, UnknownModelError
from gateway.identity import Caller
from gateway.proxy.body import Body
from gateway.proxy.endpoints import CHAT
from gateway.routing.breaker import Breaker
from gateway.routing.policies import (
    BLOCK_BYTES,
    POLICIES,
    Ask,
    LeastInFlight,
    LeastLoad,
    PrefixAware,
    RoundRobin,
    SessionAffinity,
    Shadow,
    block_chain,
)
from gateway.routing.pools import Pools, Reading, Replica
from gateway.routing.router import Reason, Route, Router, precision
from gateway.telemetry.latencies import Latencies
from quantize.card import Card, Speed


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Routing:
    """A router, and its pools with some of them down."""

    def __init__(
        self, down: tuple[str, ...] = (), cards: dict[str, Card] | None = None, **changes: object
    ) -> None:
        config = make_config(**changes)
        self.pools = Pools(config, Clock())
        for variant in down:
            for replica in self.pools.by_variant[variant].replicas:
                replica.breaker.not_reached()
        self.latencies = Latencies()
        self.missed: list[tuple[str, str]] = []
        self.router = Router(
            config,
            cards or make_cards(),
            self.pools,
            self.latencies,
            lambda *asked: self.missed.append(asked),
        )

    def route(
        self, role: str, model: str = "assistant", *, session: str | None = None, key: ApiKey | None = None
    ) -> Route:
        body = Body(b'{"model": "%b", "messages": []}' % model.encode())
        return self.router.route(Caller(role, session, key), body, CHAT)


make_router = Routing


@pytest.mark.parametrize(
    ("role", "model", "down", "variant", "reason"),
    [
        ("intent_classifier", "assistant", (), "int4-kv8", "cheapest_in_budget"),
        ("summarizer", "assistant", (), "int8", "cheapest_in_budget"),
        ("summarizer", "summarizer", (), "int8", "cheapest_in_budget"),
        ("core", "assistant", (), "bf16", "reference_only"),
        ("intent_classifier", "assistant", ("int4-kv8",), "int8", "raised_pool_down"),
        ("intent_classifier", "assistant", ("int4-kv8", "int8"), "bf16", "raised_pool_down"),
        ("summarizer", "assistant", ("int4-kv8",), "int8", "cheapest_in_budget"),
        ("intent_classifier", "assistant:int8", (), "int8", "explicit_variant"),
        ("intent_classifier", "assistant:int4-kv8", (), "int4-kv8", "explicit_variant"),
        ("intent_classifier", "assistant:int4-kv8", ("int4-kv8",), "int8", "raised_pool_down"),
        ("summarizer", "assistant:bf16", (), "bf16", "explicit_variant"),
        ("intent_classifier", "assistant:int8", ("int8",), "bf16", "raised_pool_down"),
    ],
)
def test_variant(role: str, model: str, down: tuple[str, ...], variant: str, reason: str) -> None:
    route = make_router(down).route(role, model)
    assert (route.role, route.variant, route.reason) == (role, variant, reason)
    assert route.replica.variant == variant


def test_a_client_may_not_lower_precision() -> None:
    for role, asked, cheapest in (("core", "int8", "bf16"), ("summarizer", "int4-kv8", "int8")):
        with pytest.raises(
            PrecisionTooLowError, match=f"the cheapest that it may use is assistant:{cheapest}"
        ):
            make_router().route(role, f"assistant:{asked}")


@pytest.mark.parametrize("model", ["gpt-4o", "assistant:int2", "other:bf16", ":", "assistant:"])
def test_unknown_model_names_the_known_ones(model: str) -> None:
    with pytest.raises(UnknownModelError, match=r"assistant, intent_classifier, .*assistant:int8"):
        make_router().route("core", model)


def test_no_replica_anywhere() -> None:
    with pytest.raises(NoReplicaError) as caught:
        make_router(("bf16", "int8", "int4-kv8")).route("intent_classifier", "assistant")
    assert caught.value.retry_after_s == 1


def test_what_a_pool_missed_is_counted() -> None:
    """Whether somebody answered instead or nobody: a pool that is scaled to zero is woken by this."""
    routing = make_router(("int4-kv8",))
    routing.route("summarizer")
    routing.route("intent_classifier")
    for replica in [*routing.pools.by_variant["int8"].replicas, *routing.pools.by_variant["bf16"].replicas]:
        replica.breaker.not_reached()
    with pytest.raises(NoReplicaError):
        routing.route("summarizer")
    assert routing.missed == [("intent_classifier", "int4-kv8"), ("summarizer", "int8")]


def test_provider_model() -> None:
    router = make_router(providers=({"model": "gpt", "litellm_model": "openai/gpt"},))
    route = router.route("core", "gpt")
    assert (route.variant, route.replica.name, route.reason) == ("provider", "gpt", "provider")


def test_precision_order() -> None:
    cards = [
        make_card("w4kv8", weight_bits=4, kv="fp8_e4m3"),
        make_card("w4", weight_bits=4),
        make_card("w8kv4", weight_bits=8, kv="int4_per_token_head"),
        make_card("w8kv8", weight_bits=8, kv="fp8"),
        make_card("w8", weight_bits=8),
        make_card("w16", weight_bits=16),
        make_card("bf16", weight_bits=16),
    ]
    assert sorted(cards, key=precision) == cards


def test_an_explicit_variant_goes_down_to_what_the_key_allows() -> None:
    key = ApiKey(name="k", sha256="0" * 64, lowest="int8")
    assert make_router().route("core", "assistant:int8", key=key).variant == "int8"
    with pytest.raises(PrecisionTooLowError, match=r"than this key allows.*assistant:int8"):
        make_router().route("core", "assistant:int4-kv8", key=key)
    assert make_router().route("core", key=key).variant == "bf16", "only when it asks for it"


@pytest.mark.parametrize("when_full", ["raise", "queue", "refuse"])
def test_a_full_pool(when_full: str) -> None:
    roles = {"summarizer": {"when_full": when_full}, "core": {}, "intent_classifier": {}}
    routing = make_router(roles=roles, gateway={"max_in_flight": 2})
    for _ in range(2):
        route = routing.route("summarizer")
        assert (route.variant, route.reason) == ("int8", Reason.CHEAPEST_IN_BUDGET)
        route.replica.take()
    if when_full == "raise":
        route = routing.route("summarizer")
        assert (route.variant, route.reason) == ("bf16", Reason.RAISED_POOL_FULL)
        return
    with pytest.raises(NoReplicaError) as caught:
        routing.route("summarizer")
    assert caught.value.may_wait == (when_full == "queue")


def test_a_canary_gets_its_share_and_sessions_stay() -> None:
    roles = {
        "core": {"canary": {"variant": "int8", "percent": 20}},
        "intent_classifier": {},
        "summarizer": {},
    }
    routing = make_router(roles=roles)
    served = {n: routing.route("core", session=f"session-{n}") for n in range(2000)}
    share = sum(route.variant == "int8" for route in served.values()) / len(served)
    assert 0.16 < share < 0.24
    assert {route.reason for route in served.values() if route.variant == "int8"} == {Reason.CANARY}
    again = {n: routing.route("core", session=f"session-{n}").variant for n in served}
    assert again == {n: route.variant for n, route in served.items()}


def timed(**tokens_per_s: float) -> dict[str, Card]:
    cards = make_cards()
    for name, rate in tokens_per_s.items():
        variant = name.replace("_", "-")
        speed = Speed(
            tokens_per_s=rate, slowest=rate, fastest=rate, together=8, prompt_tokens=128, answer_tokens=48
        )
        cards[variant] = cards[variant].model_copy(update={"speed": speed})
    return cards


def test_the_cheapest_by_memory_and_time() -> None:
    cards = timed(bf16=100, int8=150, int4_kv8=20)
    by_memory = make_router(cards=cards)
    assert by_memory.route("intent_classifier").variant == "int4-kv8"
    by_both = make_router(cards=cards, gateway={"cost": "memory_time"})
    assert by_both.route("intent_classifier").variant == "int8", "four bits are slow here"
    found = by_both.router.explain(Caller("intent_classifier", None), "assistant")
    assert next((step.variant, step.tokens_per_s) for step in found.considered) == ("int8", 150)
    slow = make_router(cards=timed(bf16=1000, int8=10, int4_kv8=10), gateway={"cost": "memory_time"})
    assert slow.route("intent_classifier").variant == "bf16"


def test_a_cost_that_nobody_has_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gateway.cost: memory_time needs .* that of int8; run"):
        make_router(cards=timed(bf16=100, int4_kv8=20), gateway={"cost": "memory_time"})


def test_a_decision_is_explained() -> None:
    found = make_router().router.explain(Caller("core", None), "assistant")
    assert (found.ladder, found.reason) == (("bf16",), Reason.REFERENCE_ONLY)
    verdicts = {step.variant: (step.verdict, " ".join(step.why)) for step in found.considered}
    assert verdicts["bf16"][0] == "reference"
    assert verdicts["int8"] == ("failed", "8-bit weights, the role asks for 16 or more")
    assert [step.variant for step in found.considered] == ["int4-kv8", "int8", "bf16"], "the cheapest first"


def test_a_hedge_waits_for_the_95th_percentile() -> None:
    roles = {"summarizer": {"hedge": True}, "core": {}, "intent_classifier": {}}
    routing = make_router(roles=roles)
    assert routing.route("summarizer").hedge_after_s is None, "nothing is known yet"
    for n in range(100):
        routing.latencies.add("summarizer", "int8", n / 100)
    assert routing.route("summarizer").hedge_after_s == pytest.approx(0.95)
    assert routing.route("core").hedge_after_s is None


def replicas(count: int) -> list[Replica]:
    return [Replica("int8", f"int8-{n}", f"http://127.0.0.1:{n + 1}", Clock()) for n in range(count)]


def ask(prompt: bytes = b"", session: str | None = None, salt: str = "") -> Ask:
    return Ask(session, salt, lambda: prompt)


def test_policies_have_names() -> None:
    assert tuple(POLICIES) == POLICY_NAMES


def test_round_robin() -> None:
    policy, three = RoundRobin(), replicas(3)
    assert [policy.pick(three, ask())[0].name for _ in range(6)] == ["int8-0", "int8-1", "int8-2"] * 2


def test_least_in_flight_then_in_turn() -> None:
    policy, three = LeastInFlight(), replicas(3)
    assert Counter(policy.pick(three, ask())[0].name for _ in range(6)) == {f"int8-{n}": 2 for n in range(3)}
    three[0].take()
    three[2].take()
    assert {policy.pick(three, ask())[0].name for _ in range(6)} == {"int8-1"}
    assert {policy.pick([three[0], three[2]], ask())[0].name for _ in range(6)} == {"int8-0", "int8-2"}


def test_least_load_counts_what_others_sent_and_falls_back() -> None:
    policy, two = LeastLoad(), replicas(2)
    two[0].take()
    assert policy.pick(two, ask())[0] is two[1], "no readings: our own requests count"
    two[0].read(Reading(running=0, waiting=0, at=Clock.now))
    two[1].read(Reading(running=3, waiting=1, at=Clock.now))
    assert policy.pick(two, ask())[0] is two[0]
    for _ in range(5):
        two[0].take()
    assert policy.pick(two, ask())[0] is two[1], "what was sent since the reading counts"
    two[1].read(Reading(running=0, waiting=0, at=Clock.now - 60))
    assert policy.pick(two, ask())[0] is two[1], "an old reading counts for nothing"


def test_sessions_stay_and_only_those_of_a_lost_replica_move() -> None:
    policy, four = SessionAffinity(), replicas(4)
    sessions = [f"s{n}" for n in range(400)]
    before = {s: policy.pick(four, ask(session=s))[0] for s in sessions}
    assert {policy.pick(four, ask(session=s))[0] for s in ["s1"] * 5} == {before["s1"]}
    assert all(60 < count < 140 for count in Counter(r.name for r in before.values()).values())
    after = {s: policy.pick(four[:3], ask(session=s))[0] for s in sessions}
    assert all(after[s] is before[s] for s in sessions if before[s] is not four[3])


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
        picked = [policy.pick(four, ask(prompt))[0] for prompt in conversation(seed, 5)]
        assert len(set(picked)) == 1
        homes.append(picked[0])
    first, work = policy.pick(four, ask(conversation(0, 6)[-1]))
    assert first is homes[0]
    assert work == pytest.approx(4000 / BLOCK_BYTES, abs=1), "only the new turn is work"


def test_prefix_aware_spreads_new_sessions_that_share_a_prompt() -> None:
    """A shared system prompt makes every new session look like a match; they must not pile up there."""
    policy, four = PrefixAware(), replicas(4)
    system = random.Random(0).randbytes(3000).hex().encode()
    homes = Counter()
    for seed in range(16):
        replica, work = policy.pick(four, ask(conversation(seed, 1, system)[0]))
        replica.take(work)
        homes[replica.name] += 1
    assert all(3 <= homes[replica.name] <= 5 for replica in four), homes


def test_prefix_aware_keeps_tenants_apart() -> None:
    prompt = conversation(1, 1)[0]
    assert block_chain(prompt, "a") != block_chain(prompt, "b")
    assert block_chain(prompt, "a") == block_chain(prompt, "a")


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), max_size=40), st.integers(1, 12))
def test_a_shadow_is_what_a_cache_of_that_size_holds(chains: list[list[int]], capacity: int) -> None:
    """Against a plain model: the most recently used blocks, an earlier block counting as used later."""
    shadow, model = Shadow(), []
    for path in chains:
        chain = [hash(tuple(path[: n + 1])) for n in range(len(path))]
        expected = next((n for n, block in enumerate(chain) if block not in model), len(chain))
        assert len(chain) - shadow.missing(chain) == expected
        shadow.add(chain, capacity)
        for block in reversed(chain):
            if block in model:
                model.remove(block)
            model.append(block)
        model = model[-capacity:]


def test_breaker_backs_off_and_doubles() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    waits = []
    for _ in range(7):
        breaker.not_reached()
        opened = clock.now
        while not breaker.closed:
            clock.now += 0.5
        waits.append(clock.now - opened)
    assert waits == [1, 2, 4, 8, 16, 30, 30]
    breaker.not_reached()
    breaker.healthy()
    assert breaker.closed


def test_breaker_opens_on_the_third_broken_answer_in_a_row() -> None:
    breaker = Breaker(Clock())
    for _ in range(2):
        breaker.answer_broke()
    breaker.answered()  # as after a 4xx: the replica works
    for _ in range(2):
        breaker.answer_broke()
    assert breaker.closed
    breaker.answer_broke()
    assert not breaker.closed
    breaker.healthy()
    assert not breaker.closed, "an engine that answers 500 often reports that it is healthy"
