"""What engines serve of requests: what one does not serve goes to the next that does, and never wrongly."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_stack import by_id, make_card, make_config

from deploy.encoder.requests import ChatAsked as ClassifierAsked
from deploy.engine_server import BadRequestError
from deploy.llama.requests import ChatAsked as LlamaAsked
from gateway.config import Config
from gateway.identity import Caller
from gateway.proxy.body import Body
from gateway.proxy.endpoints import CHAT, Endpoint, endpoint_of
from gateway.proxy.large import LargeBody
from gateway.proxy.scan import first_level
from gateway.routing.choices import Reason
from gateway.routing.pools import Pools
from gateway.routing.router import Route, Router
from gateway.routing.serving import CLASSIFIER_LACKS, LLAMA_LACKS
from quantize.card import LLAMA, ONNX, Card, Paired

ROLE = "intent_classifier"
MODELS: dict[str, Any] = {
    "assistant": {"path": "model", "serve": ("bf16", "gguf-q4_k_m")},
    "intents": {"path": "intents", "reference": "fp32", "serve": ("fp32", "int8-dynamic")},
}
CLASSIFIER, GGUF, WHOLE = "intents:int8-dynamic", "assistant:gguf-q4_k_m", "assistant:bf16"
SAME = Paired(items=1000, good=950, reference_good=950, flips_to_bad=0, flips_to_good=0, mcnemar_p=1.0)


def config() -> Config:
    fields = make_config().model_dump(mode="json", exclude={"models", "roles", "default_role", "pools"})
    roles = {ROLE: {"models": ("assistant", "intents")}, "core": {}}
    return Config.model_validate(fields | {"models": MODELS, "roles": roles, "default_role": "core"})


def classifier(variant: str, **changes: Any) -> Card:
    card = make_card(
        variant,
        model="intents",
        reference="fp32",
        passes=(ROLE,),
        target=ONNX,
        kv_bytes_per_token=0,
        max_model_len=512,
        **changes,
    )
    assert card.evaluation is not None
    role = card.evaluation.roles[ROLE].model_copy(update={"across": {"assistant": SAME}})
    evaluation = card.evaluation.model_copy(update={"roles": {ROLE: role}})
    return card.model_copy(update={"evaluation": evaluation})


def cards() -> dict[str, Card]:
    gguf = make_card("gguf-q4_k_m", passes=(ROLE,), weight_bits=4, weight_bytes=5_000_000, target=LLAMA)
    return by_id(
        make_card("bf16"),
        gguf,
        classifier("fp32", weight_bits=32, weight_bytes=4_000_000),
        classifier("int8-dynamic", weight_bits=8, weight_bytes=1_000_000),
    )


class Routing:
    def __init__(self) -> None:
        self.pools = Pools(config(), lambda: 100.0)
        self.router = Router(config(), cards(), self.pools)

    def route(self, endpoint: Endpoint = CHAT, model: str = ROLE, **body: Any) -> Route:
        raw = json.dumps({"model": model, **body}).encode()
        return self.router.route(Caller(ROLE, None), Body(raw), endpoint)


@pytest.fixture
def routing() -> Routing:
    return Routing()


def at(path: str) -> Endpoint:
    found = endpoint_of(path)
    assert found is not None
    return found


def test_a_classifier_is_the_cheapest_of_its_role_and_gets_plain_chats(routing: Routing) -> None:
    assert routing.router.ladder(ROLE) == (CLASSIFIER, "intents:fp32", GGUF, WHOLE)
    about = [{"role": "user", "content": 'what is {"type": "image_url"}?'}]
    for more in ({}, {"stream": True}, {"n": 1, "tools": []}, {"response_format": {"type": "text"}}):
        route = routing.route(messages=about, **more)
        assert (route.variant, route.reason) == (CLASSIFIER, Reason.CHEAPEST_IN_BUDGET), more
    assert routing.route(at("/v1/classify"), input="hi").variant == CLASSIFIER


TOOLS = [{"type": "function", "function": {"name": "f"}}]
PICTURE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,a"}}]}]
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}


def formatted(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


@pytest.mark.parametrize(
    ("path", "body", "variant"),
    [
        ("/v1/chat/completions", {"messages": [], "tools": TOOLS}, WHOLE),
        ("/v1/chat/completions", {"messages": [], "n": 2}, GGUF),
        ("/v1/chat/completions", {"messages": [], "response_format": {"type": "json_object"}}, GGUF),
        ("/v1/chat/completions", {"messages": [], "response_format": formatted(SCHEMA)}, GGUF),
        (
            "/v1/chat/completions",
            {"messages": [], "response_format": formatted({"$ref": "#/$defs/a"})},
            WHOLE,
        ),
        ("/v1/chat/completions", {"messages": [], "prompt_logprobs": 1}, WHOLE),
        ("/v1/chat/completions", {"messages": PICTURE}, WHOLE),
        ("/v1/completions", {"prompt": "a"}, GGUF),
        ("/v1/completions", {"prompt": "a", "echo": True}, WHOLE),
        ("/v1/completions", {"prompt": "a", "echo": False, "suffix": None}, GGUF),
        ("/v1/responses", {"input": "a"}, WHOLE),
        ("/v1/messages", {"messages": []}, WHOLE),
        ("/v1/embeddings", {"input": "a"}, WHOLE),
    ],
)
def test_what_an_engine_does_not_serve_goes_to_the_first_that_does(
    path: str, body: dict[str, Any], variant: str, routing: Routing
) -> None:
    route = routing.route(at(path), **body)
    assert (route.variant, route.reason) == (variant, Reason.RAISED_NOT_SERVED)
    large = json.dumps({"model": ROLE, **body}).encode()
    steps = first_level(large)
    try:
        while True:
            next(steps)
    except StopIteration as end:
        read = LargeBody(large, end.value, at(path).reads)
    assert routing.router.route(Caller(ROLE, None), read, at(path)).variant == variant, "in a large body"


def test_a_classifier_that_is_down_is_stood_in_for(routing: Routing) -> None:
    for variant in (CLASSIFIER, "intents:fp32"):
        for replica in routing.pools.by_variant[variant].replicas:
            replica.breaker.not_reached()
    route = routing.route(messages=[])
    assert (route.variant, route.reason) == (GGUF, Reason.RAISED_POOL_DOWN)
    assert routing.route(messages=[], tools=TOOLS).variant == WHOLE


def test_who_names_a_classifier_has_its_engine_say_what_it_does_not_serve(routing: Routing) -> None:
    assert routing.route(at("/v1/completions"), "intents", prompt="a").variant == CLASSIFIER
    assert routing.route(model=GGUF, messages=[], tools=TOOLS).variant == WHOLE


@pytest.mark.parametrize(("asked", "lacks"), [(LlamaAsked, LLAMA_LACKS), (ClassifierAsked, CLASSIFIER_LACKS)])
def test_engines_refuse_what_is_not_sent_to_them(asked: Any, lacks: tuple[str, ...]) -> None:
    for name in lacks:
        with pytest.raises(BadRequestError, match=name):
            asked.model_validate({"messages": [{"role": "user", "content": "a"}], name: {"type": "x"}})
