"""A fleet of several models: whose variant serves whom, and that nobody gets what is not allowed."""

from __future__ import annotations

from typing import Any

import pytest
from fleet import MODELS, QUANTIZED, ROLES, cards_of, quantized
from gateway_stack import make_config

from gateway.config import ApiKey, Config, ConfigError
from gateway.errors import ForbiddenError, NoReplicaError, PrecisionTooLowError, UnknownModelError
from gateway.identity import Caller
from gateway.proxy.body import Body
from gateway.proxy.endpoints import CHAT
from gateway.routing.choices import Reason
from gateway.routing.hedging import Hedging
from gateway.routing.pools import Pools
from gateway.routing.router import Route, Router
from quantize.card import Card


def fleet(**changes: Any) -> Config:
    given = {"models": MODELS, "roles": ROLES, "default_role": "core"} | changes
    fields = make_config().model_dump(mode="json", exclude={"models", "roles", "default_role", "pools"})
    return Config.model_validate(fields | given)


class Routing:
    def __init__(self, cards: dict[str, Card] | None = None, **changes: Any) -> None:
        self.config = fleet(**changes)
        self.pools = Pools(self.config, lambda: 100.0)
        self.router = Router(self.config, cards or cards_of(), self.pools, Hedging())

    def route(self, role: str, model: str = "", key: ApiKey | None = None) -> Route:
        body = Body(b'{"model": "%b", "messages": []}' % (model or role).encode())
        return self.router.route(Caller(role, None, key), body, CHAT)

    def down(self, *variants: str) -> None:
        for variant in variants:
            for replica in self.pools.by_variant[variant].replicas:
                replica.breaker.not_reached()


def key(**limits: Any) -> ApiKey:
    return ApiKey(name="k", sha256="0" * 64, **limits)


WHOLE = ("small:int4", "small:bf16", "big:int8", "big:bf16")


@pytest.mark.parametrize(
    ("lost", "ladder"),
    [
        (0, WHOLE),
        (200, ("big:int8", "big:bf16")),  # too many answers are wrong
        (15, ("big:int8", "big:bf16")),  # perhaps within the budget: nobody can say
        (None, ("big:int8", "big:bf16")),
    ],
)
def test_a_smaller_model_serves_a_role_where_its_answers_are_known_to_be_as_good(
    lost: int | None, ladder: tuple[str, ...]
) -> None:
    routing = Routing(cards_of(lost))
    assert routing.router.ladder("writer") == ladder
    assert routing.route("writer").variant == ladder[0]
    found = routing.router.explain(Caller("writer", None), "writer")
    assert [step.variant for step in found.considered] == list(WHOLE)
    if lost is None:
        (why,) = [step.why for step in found.considered if step.variant == "small:int4"]
        assert "not compared with big" in why[0]


def test_roles_are_served_by_their_own_models() -> None:
    routing = Routing()
    assert routing.router.ladder("core") == ("big:bf16",)
    assert routing.router.ladder("tagger") == ("small:int4", "small:bf16")
    assert routing.route("core").reason is Reason.REFERENCE_ONLY


def test_a_request_goes_up_over_models() -> None:
    routing = Routing()
    route = routing.route("writer")
    seen = [route.variant]
    while (higher := routing.router.higher(route)) is not None:
        route = higher
        seen.append(route.variant)
    assert tuple(seen) == WHOLE
    routing.down("small:int4", "small:bf16")
    assert routing.route("writer").variant == "big:int8"
    routing.down("big:int8", "big:bf16")
    with pytest.raises(NoReplicaError):
        routing.route("writer")


def test_who_names_a_model_gets_that_model() -> None:
    """The first one of the role means the role's choice; another one is meant alone, be it the role's."""
    routing = Routing()
    assert routing.route("writer", "big").variant == "small:int4"
    assert routing.route("writer", "small").variant == "small:int4"
    assert routing.route("tagger", "big").variant == "big:bf16"
    route = routing.route("core", "small")
    assert (route.variant, route.reason, route.ladder) == (
        "small:bf16",
        Reason.REFERENCE_ONLY,
        ("small:bf16",),
    )
    routing.down("small:int4", "small:bf16")
    with pytest.raises(NoReplicaError):
        routing.route("writer", "small")


def test_a_model_that_is_named_is_held_to_its_own_reference() -> None:
    routing = Routing(cards_of(lost=200))
    assert routing.route("writer", "small").variant == "small:int4"
    assert routing.route("writer").variant == "big:int8"


def test_a_variant_that_is_named_goes_up_within_its_model() -> None:
    routing = Routing()
    route = routing.route("writer", "small:int4")
    assert (route.variant, route.reason) == ("small:int4", Reason.EXPLICIT_VARIANT)
    assert route.ladder == ("small:int4", "small:bf16")
    with pytest.raises(PrecisionTooLowError, match="small:int4 is less precise than role core allows"):
        routing.route("core", "small:int4")
    with pytest.raises(UnknownModelError, match="use one of: big, small, core, writer, tagger, big:bf16"):
        routing.route("core", "small:int8")


def test_the_least_precision_of_a_key_is_of_its_model_alone() -> None:
    routing, low = Routing(), key(lowest="big:int8")
    assert routing.route("core", "big:int8", key=low).variant == "big:int8"
    with pytest.raises(PrecisionTooLowError, match="than role core allows"):
        routing.route("core", "small:int4", key=low)


@pytest.mark.parametrize(
    ("models", "role", "model", "ladder"),
    [
        (("small",), "writer", "writer", ("small:int4", "small:bf16")),
        (("small",), "writer", "small", ("small:int4", "small:bf16")),
        (("big",), "writer", "writer", ("big:int8", "big:bf16")),
        (("big",), "writer", "big", ("big:int8", "big:bf16")),
        (("big", "small"), "writer", "writer", WHOLE),
        (("writer",), "writer", "writer", WHOLE),
        (("small",), "tagger", "tagger", ("small:int4", "small:bf16")),
    ],
)
def test_a_key_for_one_model_is_served_by_no_other(
    models: tuple[str, ...], role: str, model: str, ladder: tuple[str, ...]
) -> None:
    routing = Routing(cards_of(lost=0))
    assert routing.route(role, model, key(models=models)).ladder == ladder


def test_plans_of_keys_are_apart() -> None:
    """What one key may not use, it does not get since another one has asked before."""
    routing = Routing()
    for _ in range(2):
        assert routing.route("writer").ladder == WHOLE
        assert routing.route("writer", key=key(models=("small",))).ladder == WHOLE[:2]
        assert routing.route("writer", key=key(models=("big",))).ladder == WHOLE[2:]


def test_a_key_that_may_use_none_of_a_roles_models_is_refused() -> None:
    with pytest.raises(ForbiddenError, match="this key may not use 'core' as core, which big may serve"):
        Routing().route("core", key=key(models=("small",)))


def test_an_adapter_is_of_one_model() -> None:
    adapters = {"tone": {"variants": ("small:bf16", "small:int4")}}
    routing = Routing(adapters=adapters)
    assert routing.route("writer", "tone").ladder == ("small:int4", "small:bf16")
    assert routing.route("core", "tone").ladder == ("small:bf16",)
    assert routing.router.variants_of("tone") == ("small:bf16", "small:int4")


def test_an_adapter_needs_its_reference_only_where_that_is_served() -> None:
    adapters = {"tone": {"variants": ("big:int8",)}}
    with pytest.raises(ValueError, match="must contain the reference 'big:bf16'"):
        fleet(adapters=adapters)
    routing = Routing(quantized("core", "writer"), adapters=adapters, **ALONE)
    assert routing.route("core", "tone").ladder == ("big:int8",)


def test_a_canary_is_of_a_model_that_may_serve_the_role() -> None:
    roles = ROLES | {"core": {"models": ("big", "small"), "canary": {"variant": "int4", "percent": 100}}}
    routing = Routing(roles=roles)
    route = routing.route("core")
    assert (route.variant, route.reason) == ("small:int4", Reason.CANARY)
    assert route.ladder == ("small:int4", "big:bf16")
    assert routing.route("core", key=key(models=("big",))).variant == "big:bf16"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"pools": {"bf16": ("http://a",)}},
            "several models serve 'bf16'; write one of: big:bf16, small:bf16",
        ),
        (
            {"pools": {"big:bf16": ("http://a:1",), "small:bf16": ("http://b:1", "http://a:1/")}},
            "pools.small:bf16: http://a:1 is in the pool of big:bf16 as well; an engine serves one variant",
        ),
        ({"roles": ROLES | {"small": {}}}, "roles.small: is also a model's name"),
        ({"adapters": {"tone": {}}}, "an adapter is of one model, and these are of big, small"),
        (
            {"roles": ROLES | {"core": {"canary": {"variant": "int4", "percent": 1}}}},
            "may not serve the role",
        ),
        ({"roles": ROLES | {"core": {"models": ("tiny",)}}}, "'tiny' is not a model; known: big, small"),
        ({"keys": [key(lowest="bf16").model_dump()]}, "several models serve 'bf16'"),
        (
            {"watch": {"reference": "none", "judge": {"model": "small"}}},
            "'small' stands for its reference, which is left alone",
        ),
    ],
)
def test_names_that_could_be_two_things_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fleet(**changes)


# where no reference is served

ALONE: dict[str, Any] = {"models": QUANTIZED, "watch": {"reference": "none", "store": "sqlite://"}}


def test_without_a_reference_the_ladder_ends_with_the_most_precise_that_passes() -> None:
    routing = Routing(quantized("core", "writer"), **ALONE)
    assert routing.router.ladder("core") == ("big:int4", "big:int8")
    assert routing.router.ladder("writer") == ("small:int4", "big:int4", "big:int8")
    assert routing.router.ladder("tagger") == ("small:int4",)
    assert routing.route("core").reason is Reason.CHEAPEST_IN_BUDGET


def test_the_last_variant_of_a_role_serves_whatever_the_watch_finds() -> None:
    routing = Routing(quantized("core", "writer"), **ALONE)
    routing.router.avoid({("big:int8", "core"): "harmed"})
    assert routing.router.ladder("core") == ("big:int4",), "a cheaper one that passes is as good"
    routing.router.avoid({("big:int8", "core"): "harmed", ("big:int4", "core"): "harmed"})
    assert routing.router.ladder("core") == ("big:int8",), "somebody has to"


def test_a_role_that_nobody_is_good_enough_for_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError) as caught:
        Routing(quantized("writer"), **ALONE)
    said = str(caught.value)
    assert "roles.core: the reference big:bf16 is not served" in said
    assert "big:int8: not evaluated for role core" in said
    assert "run `tiercel quantize`" in said
    assert "add bf16 to models.big.serve" in said


def test_a_model_without_evidence_is_not_to_be_had_by_its_name() -> None:
    routing = Routing(quantized("core", "writer"), **ALONE)
    for model in ("small", "small:int4"):
        with pytest.raises(PrecisionTooLowError, match="known to be good enough for role core"):
            routing.route("core", model)
    allowed = key(lowest="small:int4")
    assert routing.route("core", "small:int4", key=allowed).variant == "small:int4"
