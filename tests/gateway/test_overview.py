"""What the console is told: everything of the gateway in one answer, right with several workers too."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from gateway_stack import Stack, eventually, make_card, running_gateway, write_variants
from prometheus_client import CollectorRegistry
from test_workers import ask, workers

from gateway.api.overview import SEVERAL, Overview, module_bits
from gateway.console.history import ALL, KEPT, History, Totals, quantile
from gateway.identity import hash_of
from gateway.telemetry.metrics import Metrics
from gateway.upstream.fake import FakeEngine

KEYS = (
    {"name": "boss", "sha256": hash_of("boss"), "admin": True},
    {"name": "agent", "sha256": hash_of("agent")},
)


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


async def overview(stack: Stack, **query: Any) -> dict[str, Any]:
    async with stack.http.get(stack.url + "/admin/overview", params=query) as response:
        assert response.status == 200, await response.text()
        return dict(await response.json())


async def chat(stack: Stack, role: str, times: int = 1, status: int = 200, **body: Any) -> None:
    for _ in range(times):
        async with stack.post(body, headers={"x-agent-role": role}) as response:
            await response.read()
            assert response.status == status


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample a second."""
    monkeypatch.setattr("gateway.api.overview.INTERVAL_S", 1)


async def test_it_says_what_every_role_runs_on_and_why() -> None:
    roles = {
        "intent_classifier": {"canary": {"variant": "int8", "percent": 5}},
        "core": {"budget": {"min_weight_bits": 16}},
    }
    async with running_gateway(roles=roles) as stack:
        await eventually(lambda: stack.gateway.plane.snapshot.pools.by_variant["assistant:int8"].reachable)
        setup = (await overview(stack))["setup"]
        classifier, core = setup["roles"]
        assert classifier["ladder"] == ["assistant:int4-kv8", "assistant:int8", "assistant:bf16"]
        assert (classifier["reason"], core["reason"]) == ("cheapest_in_budget", "reference_only")
        assert classifier["canary"] == {"variant": "assistant:int8", "percent": 5.0}
        verdicts = {step["variant"]: step["verdict"] for step in core["considered"]}
        assert verdicts == {
            "assistant:int4-kv8": "failed",
            "assistant:int8": "failed",
            "assistant:bf16": "reference",
        }
        assert any("16 or more" in why for step in core["considered"] for why in step["why"])
        cards = {card["variant"]: card for card in setup["variants"]}
        assert cards["assistant:int4-kv8"]["weight_bytes"] == 3_000_000
        assert cards["assistant:int8"]["text"]["kl_mean"] == 0.001
        assert cards["assistant:int8"]["roles"]["summarizer"]["accuracy"] == 0.95
        assert cards["assistant:int8"]["roles"]["summarizer"]["kl"] == 0.001


async def test_what_is_known_is_left_out_until_it_changes() -> None:
    async with running_gateway() as stack:
        known = (await overview(stack))["setup_id"]
        assert (await overview(stack, known=known))["setup"] is None
        order = {"action": "demote", "variant": "int4-kv8", "role": "intent_classifier", "why": "a look"}
        async with stack.http.post(stack.url + "/admin/watch", json=order) as response:
            assert response.status == 200
        again = await overview(stack, known=known)
        assert again["setup_id"] != known
        role = again["setup"]["roles"][0]
        assert (role["ladder"], role["reason"]) == (["assistant:int8", "assistant:bf16"], "raised_demoted")
        assert {"variant": "assistant:int4-kv8", "verdict": "demoted", "why": ["a look"]}.items() <= role[
            "considered"
        ][0].items()


async def test_replicas_are_shown_as_engines_and_the_gateway_see_them() -> None:
    async with running_gateway() as stack:
        stack.engines["int8"].kv_cache_usage = 0.25
        stack.engines["int8"].waiting = 3
        stack.engines["int4-kv8"].script.healthy = False

        async def seen() -> bool:
            found = {one["name"]: one for one in (await overview(stack))["replicas"]}
            full, down = found["assistant:int8-0"], found["assistant:int4-kv8-0"]
            return (full["kv_cache_usage"], full["waiting"]) == (0.25, 3) and down["reachable"] is False

        await eventually(seen)


@pytest.mark.usefixtures("quick")
async def test_rates_of_the_last_minute_and_samples_for_charts() -> None:
    async with running_gateway(keys=()) as stack:
        await chat(stack, "intent_classifier", 3, stream=True)
        stack.engines["bf16"].script.status = 500
        await chat(stack, "core", 2, status=502)
        found: dict[str, Any] = {}

        async def sampled() -> bool:
            found.update(await overview(stack))
            return len(found["last_minute"]["series"]) == 3

        await eventually(sampled)
        minute = found["last_minute"]
        series = {(role, variant): figures for role, variant, *figures in minute["series"]}
        requests, errors, tokens, p50, p95, first50, _ = series["intent_classifier", "assistant:int4-kv8"]
        assert round(requests * minute["seconds"]) == 3
        assert (errors, round(tokens * minute["seconds"])) == (0, 12)
        assert 0 < first50 <= p50 <= p95
        assert round(series["core", "assistant:bf16"][1] * minute["seconds"]) == 2, "errors"
        assert series["core", "assistant:bf16"][5] is None, "nothing of those was streamed"
        assert round(series["", ""][0] * minute["seconds"]) == 5, "all traffic"
        assert ["intent_classifier", "assistant:int4-kv8", "cheapest_in_budget", 3.0] in minute["routes"]
        assert ["intent_classifier", "assistant:int4-kv8", "completion", 12.0] in found["tokens"]
        assert found["requests"] == 5
        at = found["samples"][-1]["at"]
        assert set(found["samples"][-1]["engines"]) == {
            "assistant:bf16-0",
            "assistant:int8-0",
            "assistant:int4-kv8-0",
        }
        assert all(sample["at"] > at for sample in (await overview(stack, since=at))["samples"])


async def test_it_is_for_admins() -> None:
    async with running_gateway(keys=KEYS) as stack:
        for headers, status in (
            ({}, 401),
            (bearer("wrong"), 401),
            (bearer("agent"), 403),
            (bearer("boss"), 200),
        ):
            async with stack.http.get(stack.url + "/admin/overview", headers=headers) as response:
                assert response.status == status
        async with stack.post(headers=bearer("agent")) as response:
            await response.read()
        async with stack.http.get(stack.url + "/admin/overview", headers=bearer("boss")) as response:
            text = await response.text()
            assert ["agent", "core", "assistant:bf16", "completion", 4.0] in (await response.json())[
                "key_tokens"
            ]
        assert not any(key["sha256"] in text for key in KEYS)


async def test_the_configuration_can_be_sent_back_as_it_was_shown(tmp_path: Path) -> None:
    write_variants(tmp_path)
    async with running_gateway(keys=KEYS, variants_dir=tmp_path) as stack:
        path = stack.url + "/admin/config"

        async def put(config: Any) -> int:
            headers = bearer("boss") | {"content-type": "application/yaml"}
            async with stack.http.put(path, json=config, headers=headers) as response:
                return int(response.status)

        async with stack.http.get(path, headers=bearer("boss")) as response:
            config = await response.json()
        config["roles"]["core"]["canary"] = {"variant": "int8", "percent": 100}
        assert await put(config) == 200
        async with stack.post(headers=bearer("agent")) as response:
            assert response.headers["x-tiercel-route-reason"] == "canary", "keys are what they were"
        config["keys"][0]["name"] = "nobody"
        assert await put(config) == 400, "a hidden hash of a key that is not known is none"
        async with stack.post(headers=bearer("agent")) as response:
            assert response.status == 200


async def test_the_page_is_public_and_asks_nobody_else_for_anything() -> None:
    async with running_gateway(keys=KEYS) as stack:
        async with stack.http.get(stack.url + "/console", allow_redirects=False) as response:
            assert (response.status, response.headers["location"]) == (308, "console/")
        for name, kind in (("", "text/html"), ("main.js", "javascript"), ("console.css", "text/css")):
            async with stack.http.get(f"{stack.url}/console/{name}") as response:
                assert response.status == 200
                assert kind in response.headers["content-type"]
                policy = response.headers["content-security-policy"]
                assert "default-src 'self'" in policy
                assert "frame-ancestors 'none'" in policy
                assert "unsafe" not in policy
                assert response.headers["x-content-type-options"] == "nosniff"
                assert response.headers["referrer-policy"] == "no-referrer"
                assert "http" not in (await response.text()).replace("http://www.w3.org/2000/svg", "")
        for name in ("nothing.js", "..%2ffiles.py", "../files.py"):
            async with stack.http.get(f"{stack.url}/console/{name}") as response:
                assert response.status == 404


async def test_several_workers_are_added_up(tmp_path: Path, free_port: int) -> None:
    async with (
        FakeEngine().serving() as engine,
        workers(tmp_path, free_port, engine) as url,
        aiohttp.ClientSession() as http,
    ):

        async def show() -> dict[str, Any]:
            async with http.get(url + "/admin/overview") as response:
                return dict(await response.json())

        assert (await show())["lacks"] == [SEVERAL]
        await asyncio.gather(*(ask(url) for _ in range(12)))

        async def counted() -> bool:
            found = await show()
            rates = {(role, variant): figures for role, variant, *figures in found["last_minute"]["series"]}
            return found["requests"] == 12 and round(rates[ALL][0] * found["last_minute"]["seconds"]) == 12

        await eventually(counted)


def sums(metrics: Metrics, requests: float) -> list[float]:
    buckets = [0.0] * (len(metrics.duration.bounds) + 1 + len(metrics.first_token.bounds) + 1)
    return [requests, 0.0, 0.0, *buckets]


def test_history_is_bounded_and_a_worker_that_starts_anew_is_no_negative_rate() -> None:
    metrics = Metrics(CollectorRegistry(), ())
    history = History(metrics)
    for number in range(KEPT + 50):
        history.add(5 * number, Totals({("core", "assistant:bf16"): sums(metrics, 10 * number)}), {})
    assert len(history.samples) == KEPT
    assert history.last_minute()[0] == 60
    assert history.last_minute()[1]["core", "assistant:bf16"][0] == 2
    last = 5 * (KEPT + 49)
    history.add(last + 5, Totals({("core", "assistant:bf16"): sums(metrics, 3)}), {})
    history.add(last + 10, Totals({("core", "assistant:bf16"): sums(metrics, 8)}), {})
    assert all(sample.figures[ALL][0] >= 0 for sample in history.samples)
    assert history.samples[-1].figures[ALL][0] == 1
    history.add(last + 1000, Totals({("core", "assistant:bf16"): sums(metrics, 8)}), {})
    assert history.samples[-1].figures == {}, "nothing has happened"
    assert history.last_minute() == (990, {}, {}), "nobody looked: the minute begins anew"


def test_a_clock_that_is_set_back_begins_anew() -> None:
    metrics = Metrics(CollectorRegistry(), ())
    history = History(metrics)
    for number in range(5):
        history.add(1e9 + 5 * number, Totals({("core", "assistant:bf16"): sums(metrics, 10 * number)}), {})
    assert len(history.samples) == 4
    for number in range(3):
        history.add(5 * number, Totals({("core", "assistant:bf16"): sums(metrics, 50 + 5 * number)}), {})
    assert [sample.at for sample in history.samples] == [5, 10]
    assert history.last_minute()[0] == 10
    assert history.last_minute()[1]["core", "assistant:bf16"][0] == 1


async def test_samples_go_on_after_a_clock_was_set_back() -> None:
    now = [1e9]
    async with running_gateway() as stack:
        plane, metrics = stack.gateway.plane, stack.gateway.metrics
        overview = Overview(plane, metrics, lambda _: None, clock=lambda: now[0])
        for at in (1e9, 1e9 + 5, 5e8, 5e8 + 5, 5e8 + 10):
            now[0] = at
            await overview.sample()
        assert [sample.at for sample in overview._history.samples] == [int(5e8 + 5), int(5e8 + 10)]


def test_quantiles_are_interpolated_in_buckets() -> None:
    assert quantile(0.5, (1.0, 2.0), (0, 0, 0)) is None
    assert quantile(0.5, (1.0, 2.0), (10, 0, 0)) == pytest.approx(0.5)
    assert quantile(0.95, (1.0, 2.0), (50, 50, 0)) == pytest.approx(1.9)
    assert quantile(0.95, (1.0, 2.0), (0, 0, 5)) == 2.0, "above all bounds"


def test_bits_of_modules_are_by_layer_and_kind() -> None:
    layer = "model.layers.0."
    card = make_card(
        "mixed",
        module_bits={
            layer + "self_attn.q_proj": 8,
            layer + "self_attn.o_proj": 4,
            layer + "mlp.experts.0.up_proj": 4,
            layer + "mlp.experts.1.up_proj": 8,
            "lm_head": 8,
        },
        schemes={layer + "self_attn.qkv_proj": "w8a8", layer + "mlp.experts": "w4a16-g64"},
    )
    assert module_bits(card) == [
        {"kind": "mlp.experts", "layer": 0, "bits": 4, "scheme": "w4a16-g64"},
        {"kind": "self_attn.o_proj", "layer": 0, "bits": 4, "scheme": None},
        {"kind": "self_attn.q_proj", "layer": 0, "bits": 8, "scheme": "w8a8"},
    ]
