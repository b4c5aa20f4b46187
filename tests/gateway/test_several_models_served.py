"""A fleet of several models over real sockets: what engines are sent, who is asked, and what is counted."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fleet import MODELS, QUANTIZED, ROLES, cards_of, quantized
from gateway_stack import Stack, eventually, running_gateway


@asynccontextmanager
async def serving(**changes: Any) -> AsyncIterator[Stack]:
    cards = changes.pop("cards", None) or cards_of()
    given: dict[str, Any] = {"models": MODELS, "roles": ROLES, "watch": {"enabled": False}}
    async with running_gateway(cards=cards, **given | changes) as stack:
        yield stack


async def ask(stack: Stack, role: str, **body: Any) -> dict[str, str]:
    headers = body.pop("headers", {})
    async with stack.post({"model": role} | body, headers={"x-agent-role": role} | headers) as response:
        assert response.status == 200, await response.text()
        await response.read()
        return dict(response.headers)


async def test_every_engine_is_sent_its_own_name() -> None:
    adapters = {"tone": {"variants": ("small:bf16", "small:int4")}}
    async with serving(adapters=adapters) as stack:
        for role, model in (("writer", "writer"), ("core", "big"), ("tagger", "big"), ("writer", "big")):
            await ask(stack, role, model=model)
        await ask(stack, "writer", model="small:int4")
        await ask(stack, "tagger", model="tone")
        sent = {variant: [body["model"] for body in stack.asked(variant)] for variant in stack.engines}
        assert sent == {
            "big:bf16": ["big", "big"],
            "big:int8": [],
            "small:bf16": [],
            "small:int4": ["small", "small", "small", "tone"],
        }


async def test_who_names_no_model_gets_what_the_role_does() -> None:
    async with serving() as stack:
        for role, variant in (("writer", "small:int4"), ("tagger", "small:int4"), ("core", "big:bf16")):
            url, question = (
                stack.url + "/v1/chat/completions",
                {"messages": [{"role": "user", "content": "hi"}]},
            )
            async with stack.http.post(url, json=question, headers={"x-agent-role": role}) as response:
                assert response.headers["x-tiercel-variant"] == variant
        labels = {"role": "tagger", "requested": "tagger", "model": "small", "variant": "int4"}
        assert stack.sample("tiercel_requests_total", outcome="200", **labels) == 1


async def test_figures_are_by_model_and_variant() -> None:
    async with serving() as stack:
        headers = await ask(stack, "writer")
        assert headers["x-tiercel-replica"] == "small:int4-0"
        labels = {"role": "writer", "model": "small", "variant": "int4"}
        assert stack.sample("tiercel_tokens_total", kind="completion", **labels) == 4
        assert stack.sample("tiercel_variant_weight_bytes", model="big", variant="bf16") == 16_000_000
        async with stack.http.get(stack.url + "/admin/overview") as response:
            setup = (await response.json())["setup"]
        assert [model["name"] for model in setup["models"]] == ["big", "small"]
        assert {role["name"]: role["models"] for role in setup["roles"]}["writer"] == ["big", "small"]


async def test_a_model_takes_what_its_own_engines_take() -> None:
    async with serving() as stack, stack.http.get(stack.url + "/v1/models") as response:
        longest = {one["id"]: one["max_model_len"] for one in (await response.json())["data"]}
    assert longest == {
        "big": 512,  # it is what the role writer is asked by, which small may serve
        "small": 512,
        "core": 1024,
        "writer": 512,
        "tagger": 512,
        "big:bf16": 1024,
        "big:int8": 1024,
        "small:bf16": 512,
        "small:int4": 512,
    }


async def test_a_key_sees_and_gets_its_model_alone() -> None:
    digest = hashlib.sha256(b"sk-small").hexdigest()
    keys = [{"name": "small", "sha256": digest, "models": ["small"]}]
    headers = {"authorization": "Bearer sk-small"}
    async with serving(keys=keys) as stack:
        async with stack.http.get(stack.url + "/v1/models", headers=headers) as response:
            listed = [one["id"] for one in (await response.json())["data"]]
        assert listed == ["small", "writer", "tagger", "small:bf16", "small:int4"]
        assert (await ask(stack, "writer", headers=headers))["x-tiercel-variant"] == "small:int4"
        for model in ("big", "big:bf16", "core"):
            async with stack.post({"model": model}, headers=headers) as response:
                assert response.status == 403, model
        async with stack.post({"model": ""}, headers=headers) as response:
            assert response.status == 403, "the default role is none that small may serve"
        assert not stack.asked("big:bf16")


async def test_each_models_own_reference_is_asked_about_its_variants() -> None:
    """The references of two models say different things of the same tokens."""
    watch = {"rate": 1.0, "store": "sqlite://"}
    async with serving(watch=watch) as stack:
        await ask(stack, "tagger")
        await eventually(lambda: stack.sample("tiercel_shadow_compared_total", **COMPARED) == 1)
        assert [body["model"] for body in scored(stack, "small:bf16")] == ["small"]
        assert scored(stack, "big:bf16") == []


COMPARED = {"role": "tagger", "model": "small", "variant": "int4", "result": "agreed"}


def scored(stack: Stack, variant: str) -> list[dict[str, Any]]:
    return [body for body in stack.engines[variant].requests if "prompt_logprobs" in body]


async def test_the_reference_of_a_models_that_is_not_the_roles_first_is_watched_by_rules() -> None:
    watch = {"rate": 1.0, "store": "sqlite://"}
    cards = cards_of()
    del cards["small:int4"]
    models = MODELS | {"small": {"path": "small", "serve": ("bf16",)}}
    async with serving(watch=watch, cards=cards, models=models) as stack:
        assert (await ask(stack, "writer"))["x-tiercel-variant"] == "small:bf16"
        await eventually(stack.settled)
        assert scored(stack, "small:bf16") == [], "nothing is compared with itself"

        async def noted() -> bool:
            async with stack.http.get(stack.url + "/admin/watch") as response:
                cells = (await response.json())["cells"]
            mine = [c for c in cells if (c["variant"], c["role"]) == ("small:bf16", "writer")]
            return bool(mine and mine[0]["checks"].get("rules", {}).get("answers"))

        await eventually(noted)
        order = {"action": "demote", "variant": "small:bf16", "role": "writer"}
        async with stack.http.post(stack.url + "/admin/watch", json=order) as response:
            assert response.status == 200
        assert (await ask(stack, "writer"))["x-tiercel-variant"] == "big:int8"


async def test_a_person_names_a_variant_by_itself_where_one_model_has_it() -> None:
    async with serving(watch={"store": "sqlite://"}) as stack:
        for variant, role, status in (
            ("int4", "tagger", 200),
            ("bf16", "writer", 200),
            ("bf16", "tagger", 400),
        ):
            order = {"action": "demote", "variant": variant, "role": role}
            async with stack.http.post(stack.url + "/admin/watch", json=order) as response:
                assert response.status == status, (variant, role, await response.text())


async def test_without_a_reference_rules_and_signals_watch_and_nobody_is_asked() -> None:
    watch = {"reference": "none", "rate": 1.0, "store": "sqlite://", "probation_rate": 1.0}
    watch |= {"probation_after_s": 0.2}
    async with serving(models=QUANTIZED, cards=quantized("core", "writer"), watch=watch) as stack:
        assert (await ask(stack, "writer"))["x-tiercel-variant"] == "small:int4"
        await eventually(stack.settled)
        order = {"action": "demote", "variant": "small:int4", "role": "writer"}
        async with stack.http.post(stack.url + "/admin/watch", json=order) as response:
            assert response.status == 200

        async def back() -> bool:
            """Its answers on probation are judged by rules alone, of which some dozens have to be kept."""
            found = await asyncio.gather(*(ask(stack, "writer") for _ in range(8)))
            return found[-1]["x-tiercel-variant"] == "small:int4"

        assert not await back()
        await eventually(back, within_s=120)
        assert not any(scored(stack, variant) for variant in stack.engines)
        assert stack.sample("tiercel_shadow_compared_total", **COMPARED | {"role": "writer"}) == 0
