"""LoRA adapters: models of their own for clients, with the base's precision rules and engines."""

from __future__ import annotations

import random

import pytest
from gateway_stack import eventually, make_config, running_gateway
from pydantic import ValidationError

from gateway.routing.policies import PickQuery, PrefixAware
from gateway.routing.replicas import Reading, Replica
from gateway.telemetry.engines import parse_reading

ADAPTERS = {"legal": {"variants": ["bf16", "int8"]}, "tone": {}}


async def test_an_adapter_is_asked_for_by_its_own_name() -> None:
    async with running_gateway(adapters=ADAPTERS) as stack:
        async with stack.http.get(stack.url + "/v1/models") as response:
            ids = [model["id"] for model in (await response.json())["data"]]
        assert {"legal", "tone"} <= set(ids)
        for role, model, variant in (
            ("intent_classifier", "legal", "assistant:int8"),  # its cheapest, int4-kv8, has no such adapter
            ("intent_classifier", "tone", "assistant:int4-kv8"),
            ("core", "legal", "assistant:bf16"),
            ("intent_classifier", "assistant", "assistant:int4-kv8"),
        ):
            async with stack.post({"model": model}, headers={"x-agent-role": role}) as response:
                assert response.status == 200
                assert response.headers["x-tiercel-variant"] == variant
            sent = stack.asked(variant)[-1]
            assert sent["model"] == model
            assert ("logprobs" in sent) is (model == "assistant"), "what it says is not held against the base"
        assert stack.sample(
            "tiercel_requests_total", role="core", requested="legal", variant="bf16", outcome="200"
        ), "it is a model of its own in the metrics"
        async with stack.post({"model": "poetry"}) as response:
            assert response.status == 404
            assert "legal, tone" in (await response.json())["error"]["message"]


async def test_going_up_stays_with_who_has_it() -> None:
    async with running_gateway(adapters=ADAPTERS) as stack:
        stack.engines["int8"].script.healthy = False

        async def at_the_reference() -> bool:
            asked = {"x-agent-role": "summarizer"}
            async with stack.post({"model": "legal"}, headers=asked) as response:
                return response.headers.get("x-tiercel-variant") == "assistant:bf16"

        await eventually(at_the_reference)


@pytest.mark.parametrize(
    ("adapters", "says"),
    [
        ({"core": {}}, "adapters.core: is already a model or role"),
        ({"legal": {"variants": ["int2"]}}, r"adapters.legal.variants: 'int2' is not a served variant"),
        ({"legal": {"variants": ["int8"]}}, "must contain the reference 'assistant:bf16'"),
    ],
)
def test_what_cannot_be_configured(adapters: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        make_config(adapters=adapters)


def test_an_engine_says_how_many_it_holds() -> None:
    line = (
        'vllm:lora_requests_info{max_lora="4",running_lora_adapters="legal",waiting_lora_adapters=""} 1.7e9\n'
    )
    assert parse_reading(line).adapters == 4
    assert parse_reading("vllm:num_requests_waiting 0\n").adapters is None


def replicas(held: int | None) -> list[Replica]:
    found = [Replica("bf16", f"bf16-{n}", f"http://127.0.0.1:{n}", lambda: 0.0) for n in range(3)]
    for replica in found:
        replica.read(Reading(adapters=held))
    return found


def test_an_adapter_stays_where_it_is_loaded() -> None:
    policy, usable = PrefixAware(rng=random.Random(0)), replicas(held=1)
    homes: dict[str, set[str]] = {}
    for turn in range(30):
        for adapter in ("legal", "tone", "poetry"):
            prompt = f"{adapter} {turn} ".encode() * 100
            chosen, _ = policy.pick(usable, PickQuery(prompt=lambda prompt=prompt: [prompt], adapter=adapter))
            homes.setdefault(adapter, set()).add(chosen.name)
    assert all(len(names) == 1 for names in homes.values()), homes
    assert len(set.union(*homes.values())) == 3, "and each has its own"


def test_a_busy_home_is_left() -> None:
    """Loading an adapter elsewhere costs something, waiting costs more."""
    policy, usable = PrefixAware(rng=random.Random(0)), replicas(held=2)
    ask = PickQuery(prompt=lambda: [b"hello"], adapter="legal")
    home, _ = policy.pick(usable, ask)
    for _ in range(8):
        home.take(4.0)
    other, _ = policy.pick(usable, ask)
    assert other is not home


def test_prefixes_of_one_adapter_are_no_others() -> None:
    """An engine's cache is an adapter's own: the same prompt is all missing for another."""
    policy, (only, *_) = PrefixAware(), replicas(held=4)
    prompt = b"the same long prompt " * 200
    works = [
        policy.pick([only], PickQuery(prompt=lambda: [prompt], adapter=adapter))[1]
        for adapter in ("legal", "legal", "tone", "")
    ]
    assert works[1] == 0
    assert works[0] == works[2] == works[3] > 5
