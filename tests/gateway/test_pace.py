"""A role with a target goes to the cheapest variant that is expected to be in time."""

from __future__ import annotations

from typing import Any

import pytest
from gateway_stack import Stack, eventually, make_cards, make_config, running_gateway
from pydantic import ValidationError

from gateway.config import Target
from gateway.identity import Caller
from gateway.proxy.body import Body
from gateway.proxy.endpoints import CHAT
from gateway.routing.choices import Reason
from gateway.routing.hedging import Hedging
from gateway.routing.pace import AGAIN_AFTER_S, FADE_S, Paces, Trend
from gateway.routing.pools import Pools
from gateway.routing.router import Route, Router

LADDER = ("assistant:int4-kv8", "assistant:int8", "assistant:bf16")
ROLES: dict[str, Any] = {"intent_classifier": {"target": {"ttft_s": 1.0}}, "summarizer": {}, "core": {}}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Routing:
    """A router whose paces are set by hand."""

    def __init__(self, **changes: Any) -> None:
        self.clock = Clock()
        config = make_config(**{"roles": ROLES} | changes)
        self.pools = Pools(config, self.clock)
        self.paces = Paces(self.clock)
        self.router = Router(config, make_cards(), self.pools, Hedging(), paces=self.paces)

    def route(self, model: str = "intent_classifier") -> Route:
        body = Body(b'{"model": "%b", "messages": []}' % model.encode())
        return self.router.route(Caller("intent_classifier", None), body, CHAT)

    def slow(self, *variants: str, seconds: float = 5.0) -> None:
        for variant in variants:
            self.paces.first_token(variant, seconds, 1)


def test_what_nobody_has_seen_is_expected_to_be_in_time() -> None:
    route = Routing().route()
    assert (route.variant, route.reason) == (LADDER[0], Reason.CHEAPEST_IN_BUDGET)


def test_the_first_that_is_in_time_gets_the_request() -> None:
    routing = Routing()
    routing.slow(LADDER[0])
    route = routing.route()
    assert (route.variant, route.reason) == (LADDER[1], Reason.RAISED_TOO_SLOW)
    assert route.ladder == LADDER
    routing.slow(LADDER[1])
    assert routing.route().variant == LADDER[2]


def test_where_none_is_in_time_the_first_gets_it() -> None:
    routing = Routing()
    routing.slow(*LADDER)
    route = routing.route()
    assert (route.variant, route.reason) == (LADDER[0], Reason.CHEAPEST_IN_BUDGET)


def test_what_is_too_slow_is_better_than_nothing() -> None:
    routing = Routing()
    routing.slow(LADDER[0])
    for variant in LADDER[1:]:
        for replica in routing.pools.by_variant[variant].replicas:
            replica.breaker.not_reached()
    route = routing.route()
    assert (route.variant, route.reason) == (LADDER[0], Reason.CHEAPEST_IN_BUDGET)


def test_a_pool_that_is_down_is_not_called_slow() -> None:
    routing = Routing()
    for replica in routing.pools.by_variant[LADDER[0]].replicas:
        replica.breaker.not_reached()
    route = routing.route()
    assert (route.variant, route.reason) == (LADDER[1], Reason.RAISED_POOL_DOWN)
    routing.slow(LADDER[1])
    route = routing.route()
    assert (route.variant, route.reason) == (LADDER[2], Reason.RAISED_TOO_SLOW)


def test_a_variant_that_a_client_names_is_the_clients_choice() -> None:
    routing = Routing()
    routing.slow(LADDER[0])
    assert routing.route(LADDER[0]).reason == Reason.EXPLICIT_VARIANT


def test_requests_in_flight_make_a_pool_slower() -> None:
    """Ten times the requests, ten times the wait, as long as nothing else has been seen."""
    routing = Routing()
    routing.slow(LADDER[0], seconds=0.3)
    assert routing.route().variant == LADDER[0]
    for _ in range(9):
        routing.pools.by_variant[LADDER[0]].replicas[0].take()
    assert routing.route().reason is Reason.RAISED_TOO_SLOW


def test_an_idle_pool_that_was_too_slow_is_tried_again_by_one_request() -> None:
    routing = Routing()
    routing.slow(LADDER[0])
    routing.clock.now += AGAIN_AFTER_S + 1
    route = routing.route()
    assert route.variant == LADDER[0]
    lease = route.replica.take()
    assert routing.route().variant == LADDER[1], "the others wait for what comes of it"
    lease.release()
    routing.paces.first_token(LADDER[0], 0.1, 1)
    assert routing.route().variant == LADDER[0]


def test_the_whole_answer_is_expected_by_the_tokens_that_the_role_is_given() -> None:
    routing = Routing(roles=ROLES | {"intent_classifier": {"target": {"total_s": 10.0}}})
    pool = routing.pools.by_variant[LADDER[0]]
    routing.paces.answered(LADDER[0], "summarizer", 500, 25.0, 1)
    assert routing.paces.expected(pool, "intent_classifier") == (None, None), "not how long its answers are"
    routing.paces.answered(LADDER[0], "intent_classifier", 20, 1.0, 1)
    assert routing.paces.expected(pool, "intent_classifier") == (None, pytest.approx(1.0))
    assert routing.paces.expected(pool, "summarizer") == (None, pytest.approx(25.0))
    routing.paces.first_token(LADDER[0], 2.0, 1)
    assert routing.paces.expected(pool, "intent_classifier") == (2.0, pytest.approx(3.0))
    assert routing.route().variant == LADDER[0]


def test_the_line_over_the_load_is_learned() -> None:
    """An engine that is as fast with eight requests as with one is not expected to be slower with sixteen."""
    flat, steep = Trend(1.0, 1, 0.0), Trend(1.0, 1, 0.0)
    for n in range(50):
        load = 1 + 7 * (n % 2)
        flat.add(1.0, load, 0.1 * n)
        steep.add(float(load), load, 0.1 * n)
    assert flat.expected(16) == pytest.approx(1.0)
    assert steep.expected(16) == pytest.approx(16.0)
    assert steep.expected(0) >= 0


def test_what_was_seen_long_ago_counts_little() -> None:
    trend = Trend(5.0, 1, 0.0)
    trend.add(1.0, 1, 3 * FADE_S)
    assert 1.0 < trend.expected(1) < 1.25


def test_a_target_without_a_limit_is_refused() -> None:
    with pytest.raises(ValidationError, match="sets no limit; give ttft_s, total_s, or both"):
        Target()


async def ask(stack: Stack, **body: Any) -> tuple[str, str]:
    asked = {"model": "intent_classifier", "stream": True} | body
    async with stack.post(asked) as response:
        assert response.status == 200
        await response.read()
        return response.headers["x-tiercel-variant"], response.headers["x-tiercel-route-reason"]


async def test_a_slow_engine_is_left_for_one_that_is_in_time() -> None:
    """Over real sockets: what the gateway has seen decides, and who asks is told of it."""
    roles = ROLES | {"intent_classifier": {"target": {"ttft_s": 0.5}}}
    async with running_gateway(roles=roles, watch={"enabled": False}) as stack:
        stack.engines["int4-kv8"].script.first_token_delay_s = 1.0
        assert await ask(stack) == (LADDER[0], "cheapest_in_budget"), "nothing is known yet"
        assert await ask(stack) == (LADDER[1], "raised_too_slow")
        async with stack.http.post(stack.url + "/v1/route", json={"model": "intent_classifier"}) as response:
            expected = (await response.json())["expected_s"]
        assert expected[LADDER[0]]["ttft_s"] >= 1.0
        assert expected[LADDER[2]] == {"ttft_s": None, "total_s": None}
        labels = {"role": "intent_classifier", "variant": "int8", "reason": "raised_too_slow"}
        assert stack.sample("tiercel_route_total", **labels) == 1


async def test_answers_that_are_not_streamed_tell_of_the_whole_answer() -> None:
    roles = ROLES | {"intent_classifier": {"target": {"total_s": 0.5}}}
    async with running_gateway(roles=roles, watch={"enabled": False}) as stack:
        stack.engines["int4-kv8"].script.first_token_delay_s = 1.0
        assert await ask(stack, stream=False) == (LADDER[0], "cheapest_in_budget")

        async def raised() -> bool:
            return await ask(stack, stream=False) == (LADDER[1], "raised_too_slow")

        await eventually(raised)


async def test_without_a_target_nothing_is_learned() -> None:
    async with running_gateway(watch={"enabled": False}) as stack:
        await ask(stack)
        assert stack.gateway.paces._first == {}
        assert stack.gateway.paces._token == {}
