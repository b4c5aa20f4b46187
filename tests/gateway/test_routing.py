"""Which variant serves whom. A mistake here serves a core agent at four bits, or pays for sixteen."""

from __future__ import annotations

import pytest
from gateway_stack import full, make_card, make_cards, make_config

from gateway.config import ApiKey, Cost
from gateway.errors import NoReplicaError, PrecisionTooLowError, UnknownModelError
from gateway.identity import Caller
from gateway.proxy.body import Body
from gateway.proxy.endpoints import CHAT
from gateway.routing.choices import Reason
from gateway.routing.hedging import Hedging
from gateway.routing.ladders import costs, precision, untimed
from gateway.routing.pools import Pools
from gateway.routing.router import Route, Router
from quantize.card import Card
from quantize.core.engine_figures import Speed


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
            for replica in self.pools.by_variant[full(variant)].replicas:
                replica.breaker.not_reached()
        self.hedging = Hedging()
        self.missed: list[tuple[str, ...]] = []
        self.router = Router(
            config,
            cards or make_cards(),
            self.pools,
            self.hedging,
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
    assert (route.role, route.variant, route.reason) == (role, full(variant), reason)
    assert route.replica.variant == full(variant)


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


def test_the_last_pool_tries_a_replica_that_fails_rather_than_refuse_all() -> None:
    clock = Clock()
    pools = Pools(make_config(), clock)
    router = Router(make_config(), make_cards(), pools)
    for _ in range(6):
        clock.now += 30
        for replica in pools.replicas():
            replica.breaker.errored()
    body = Body(b'{"model": "summarizer", "messages": []}')
    with pytest.raises(NoReplicaError):
        router.route(Caller("summarizer", None), body, CHAT)
    clock.now += 1
    route = router.route(Caller("summarizer", None), body, CHAT)
    assert (route.variant, route.reason) == ("assistant:bf16", Reason.RAISED_POOL_DOWN)
    route.replica.take()
    with pytest.raises(NoReplicaError):
        router.route(Caller("summarizer", None), body, CHAT)


def test_a_request_without_a_model_gets_what_its_role_does() -> None:
    body = Body(b'{"messages": []}')
    route = make_router().router.route(Caller("summarizer", None), body, CHAT)
    assert (route.variant, route.reason) == ("assistant:int8", Reason.CHEAPEST_IN_BUDGET)


def test_what_is_planned_is_bounded_by_names_that_exist() -> None:
    """Names that clients invent are refused each time, and none is remembered."""
    routing = make_router()
    for n in range(200):
        with pytest.raises(UnknownModelError) as caught:
            routing.route("core", f"invented-{n}")
        assert f"invented-{n}" in caught.value.message
        assert "invented" not in caught.value.logged
    routing.route("core")
    assert len(routing.router._plans) == 1


def test_what_a_pool_missed_is_counted() -> None:
    """Whether somebody answered instead or nobody: a pool that is scaled to zero is woken by this."""
    routing = make_router(("int4-kv8",))
    routing.route("summarizer")
    routing.route("intent_classifier")
    for variant in ("assistant:int8", "assistant:bf16"):
        for replica in routing.pools.by_variant[variant].replicas:
            replica.breaker.not_reached()
    with pytest.raises(NoReplicaError):
        routing.route("summarizer")
    assert routing.missed == [
        ("intent_classifier", "assistant", "int4-kv8"),
        ("summarizer", "assistant", "int8"),
    ]


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
    key = ApiKey(name="k", sha256="0" * 64, lowest="assistant:int8")
    assert make_router().route("core", "assistant:int8", key=key).variant == "assistant:int8"
    with pytest.raises(PrecisionTooLowError, match=r"than this key allows.*assistant:int8"):
        make_router().route("core", "assistant:int4-kv8", key=key)
    assert make_router().route("core", key=key).variant == "assistant:bf16", "only when it asks for it"


@pytest.mark.parametrize("when_full", ["raise", "queue", "refuse"])
def test_a_full_pool(when_full: str) -> None:
    roles = {"summarizer": {"when_full": when_full}, "core": {}, "intent_classifier": {}}
    routing = make_router(roles=roles, gateway={"max_in_flight": 2})
    for _ in range(2):
        route = routing.route("summarizer")
        assert (route.variant, route.reason) == ("assistant:int8", Reason.CHEAPEST_IN_BUDGET)
        route.replica.take()
    if when_full == "raise":
        route = routing.route("summarizer")
        assert (route.variant, route.reason) == ("assistant:bf16", Reason.RAISED_POOL_FULL)
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
    share = sum(route.variant == "assistant:int8" for route in served.values()) / len(served)
    assert 0.16 < share < 0.24
    assert {route.reason for route in served.values() if route.variant == "assistant:int8"} == {Reason.CANARY}
    again = {n: routing.route("core", session=f"session-{n}").variant for n in served}
    assert again == {n: route.variant for n, route in served.items()}


def timed(**tokens_per_s: float) -> dict[str, Card]:
    cards = make_cards()
    for name, rate in tokens_per_s.items():
        variant = name.replace("_", "-")
        speed = Speed(
            tokens_per_s=rate, slowest=rate, fastest=rate, together=8, prompt_tokens=128, answer_tokens=48
        )
        cards[full(variant)] = cards[full(variant)].model_copy(update={"speed": speed})
    return cards


def test_the_cheapest_by_memory_and_time() -> None:
    cards = timed(bf16=100, int8=150, int4_kv8=20)
    by_memory = make_router(cards=cards)
    assert by_memory.route("intent_classifier").variant == "assistant:int4-kv8"
    by_both = make_router(cards=cards, gateway={"cost": "memory_time"})
    assert by_both.route("intent_classifier").variant == "assistant:int8", "four bits are slow here"
    found = by_both.router.explain(Caller("intent_classifier", None), "assistant")
    assert next((step.variant, step.tokens_per_s) for step in found.considered) == ("assistant:int8", 150)
    slow = make_router(cards=timed(bf16=1000, int8=10, int4_kv8=10), gateway={"cost": "memory_time"})
    assert slow.route("intent_classifier").variant == "assistant:bf16"


def test_a_variant_that_nobody_has_timed_counts_as_slow() -> None:
    cards = timed(bf16=100, int4_kv8=90)
    assert untimed(cards, Cost.MEMORY_TIME).startswith(
        "gateway.cost: memory_time: the speed of assistant:int8 was not measured, the slowest known speed is"
    )
    found = costs(cards, Cost.MEMORY_TIME)
    memory = costs(cards, Cost.MEMORY)
    assert found["assistant:int8"] == memory["assistant:int8"] / 90
    assert make_router(cards=cards, gateway={"cost": "memory_time"}).route("core").variant == "assistant:bf16"
    assert "bytes alone decide" in untimed(make_cards(), Cost.MEMORY_TIME)
    assert costs(make_cards(), Cost.MEMORY_TIME) == costs(make_cards(), Cost.MEMORY)
    assert untimed(cards, Cost.MEMORY) == untimed(timed(bf16=1, int8=1, int4_kv8=1), Cost.MEMORY_TIME) == ""


def test_a_decision_is_explained() -> None:
    found = make_router().router.explain(Caller("core", None), "assistant")
    assert (found.ladder, found.reason) == (("assistant:bf16",), Reason.REFERENCE_ONLY)
    verdicts = {step.variant: (step.verdict, " ".join(step.why)) for step in found.considered}
    assert verdicts["assistant:bf16"][0] == "reference"
    assert verdicts["assistant:int8"] == ("failed", "8-bit weights, the role asks for 16 or more")
    order = ["assistant:int4-kv8", "assistant:int8", "assistant:bf16"]
    assert [step.variant for step in found.considered] == order, "the cheapest first"


def test_a_hedge_waits_for_the_95th_percentile() -> None:
    roles = {"summarizer": {"hedge": True}, "core": {}, "intent_classifier": {}}
    routing = make_router(roles=roles)
    assert routing.route("summarizer").hedge_after_s is None, "nothing is known yet"
    kind = ("summarizer", "assistant:int8", CHAT.path, False)
    assert routing.route("summarizer").kind == kind
    for n in range(100):
        routing.hedging.seconds(kind, n / 100)
    assert routing.route("summarizer").hedge_after_s == pytest.approx(0.95)
    assert routing.route("core").hedge_after_s is None
    assert routing.route("core").kind is None
