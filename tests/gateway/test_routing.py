"""Which variant serves whom. A mistake here serves a core agent at four bits, or pays for sixteen."""

from __future__ import annotations

import pytest
from gateway_stack import make_card, make_cards, make_config

from gateway.errors import NoReplicaError, PrecisionTooLowError, UnknownModelError
from gateway.routing.breaker import Breaker
from gateway.routing.pools import Pools
from gateway.routing.router import Router, precision


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make_router(down: tuple[str, ...] = (), **changes: object) -> Router:
    config = make_config(**changes)
    pools = Pools(config, Clock())
    for variant in down:
        for replica in pools.by_variant[variant].replicas:
            replica.breaker.not_reached()
    return Router(config, make_cards(), pools)


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


def test_least_in_flight_then_in_turn() -> None:
    urls = tuple(f"http://127.0.0.1:{port}" for port in (1, 2, 3))
    pool = Pools(make_config(pools={"int8": urls}), Clock()).by_variant["int8"]
    assert [pool.pick().name for _ in range(6)] == ["int8-0", "int8-1", "int8-2"] * 2
    pool.replicas[0].take()
    pool.replicas[2].take()
    assert {pool.pick().name for _ in range(6)} == {"int8-1"}
    pool.replicas[1].breaker.not_reached()
    assert {pool.pick().name for _ in range(6)} == {"int8-0", "int8-2"}


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
