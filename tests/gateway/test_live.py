"""What changes while the gateway runs: its configuration, full pools, slow replicas, replicas that start."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest
from gateway_stack import CHAT, Stack, eventually, from_clients, running_gateway, settings, write_variants

from gateway.routing.discovery import Discovery


async def test_the_configuration_is_swapped_whole_or_not_at_all(tmp_path: Path) -> None:
    write_variants(tmp_path)
    async with running_gateway() as stack:
        config = stack.gateway.plane.snapshot.config
        urls = {variant: list(config.replicas(variant)) for variant in config.served}
        port = {"gateway": {"port": config.gateway.port}}

        async def put(text: str) -> tuple[int, Any]:
            headers = {"content-type": "application/yaml"}
            async with stack.http.put(stack.url + "/admin/config", data=text, headers=headers) as response:
                return response.status, await response.json()

        stack.engines["bf16"].script.token_delay_s = 0.1
        running = await stack.post({"stream": True})
        await running.content.readany()
        status, answer = await put(settings(tmp_path, urls, default_role="summarizer", **port))
        assert (status, answer["applied"]) == (200, True)
        assert (await running.read()).endswith(b"data: [DONE]\n\n"), "what runs goes on as it began"
        async with stack.post() as response:
            assert response.headers["x-tiercel-variant"] == "assistant:int8", "what comes is routed anew"
        before = stack.gateway.plane.snapshot
        for text, says in (
            (settings(tmp_path, urls, default_role="boss", **port), "'boss' is not a role"),
            (settings(tmp_path, urls, serve=["bf16", "int2"], pools={}, **port), "int2"),
            (settings(tmp_path, urls, gateway={"port": 9}), "cannot change while the gateway runs"),
            (settings(tmp_path, urls, rolls={}, **port), "unknown key; did you mean 'roles'?"),
            ("roles: [", "is not valid YAML"),
        ):
            status, answer = await put(text)
            assert status == 400, text
            assert says in answer["error"]["message"]
        assert stack.gateway.plane.snapshot is before
        pools = {r.name: r for r in before.pools.replicas()}
        await put(settings(tmp_path, urls, **port))
        now = {r.name: r for r in stack.gateway.plane.snapshot.pools.replicas()}
        assert all(now[name] is pools[name] for name in pools), "replicas keep their connections"

        stack.gateway.metrics.demoted.labels("summarizer", "assistant", "int8").set(1)
        stack.gateway.metrics.demoted.labels("core", "assistant", "bf16").set(0)
        assert stack.sample("tiercel_variant_weight_bytes", variant="int8") == 5_000_000
        without = {variant: url for variant, url in urls.items() if variant != "assistant:int8"}
        assert (await put(settings(tmp_path, without, serve=["bf16", "int4-kv8"], **port)))[0] == 200
        left = {
            sample.labels["variant"]
            for family in stack.registry.collect()
            for sample in family.samples
            if sample.name in ("tiercel_variant_demoted", "tiercel_variant_weight_bytes")
        }
        assert left == {"bf16", "int4-kv8"}, "nobody is told that what is gone is demoted"


async def test_without_keys_the_admin_is_for_this_machine_alone() -> None:
    """A page whose name means this machine's address comes with its own name in the header."""
    async with running_gateway() as stack:
        for host, status in (("evil.example", 403), ("localhost", 200), ("127.0.0.1:1", 200), ("[::1]", 200)):
            async with stack.http.get(stack.url + "/admin/config", headers={"host": host}) as response:
                assert response.status == status, host
                if status == 403:
                    assert "'evil.example' is not this machine" in (await response.json())["error"]["message"]


async def test_a_full_pool_is_waited_for_or_left() -> None:
    roles = {
        "intent_classifier": {"when_full": "queue", "wait_s": 60},
        "summarizer": {"when_full": "refuse"},
        "core": {},
    }
    async with running_gateway(roles=roles, gateway={"max_in_flight": 1}) as stack:
        for engine in stack.engines.values():
            engine.script.first_token_delay_s = 60
        first = asyncio.ensure_future(_variant(stack, "intent_classifier"))
        await eventually(lambda: stack.engines["int4-kv8"].running)
        stack.engines["int4-kv8"].script.first_token_delay_s = 0
        second = asyncio.ensure_future(_variant(stack, "intent_classifier"))
        await eventually(lambda: stack.gateway.plane.lines)
        first.cancel()
        assert await second == "assistant:int4-kv8", "it waited"
        busy = asyncio.ensure_future(_variant(stack, "summarizer"))
        await eventually(lambda: stack.engines["int8"].running)
        async with stack.post({"model": "summarizer"}) as response:
            assert response.status == 503
            assert response.headers["retry-after"] == "1"
            assert "full" in (await response.json())["error"]["message"]
        busy.cancel()


async def test_who_waits_is_served_in_turn_and_at_once() -> None:
    roles = {"core": {"when_full": "queue", "wait_s": 600}, "summarizer": {}, "intent_classifier": {}}
    async with running_gateway(roles=roles, gateway={"max_in_flight": 1}) as stack:
        engine, lines = stack.engines["bf16"], stack.gateway.plane.lines
        engine.script.first_token_delay_s = 600
        done: list[int] = []

        async def ask(n: int) -> None:
            await _variant(stack, "core")
            done.append(n)

        first = asyncio.ensure_future(ask(-1))
        await eventually(lambda: engine.running)
        engine.script.first_token_delay_s = 0.03
        asking = []
        for n in range(12):
            asking.append(asyncio.ensure_future(ask(n)))
            await eventually(lambda n=n: len(lines) == n + 1)
        first.cancel()  # its client leaves, and there is room
        async with asyncio.timeout(25):  # whoever is not woken waits for its time to end
            await asyncio.gather(*asking)
        assert done == list(range(12))
        assert not lines


async def test_a_pool_that_starts_is_waited_for(free_port: int) -> None:
    roles = {"core": {"wait_s": 60}, "summarizer": {}, "intent_classifier": {}}
    pools = {"bf16": (f"http://127.0.0.1:{free_port}",)}
    async with running_gateway(roles=roles, pools=pools) as stack:
        asking = asyncio.ensure_future(_variant(stack, "core"))
        await eventually(lambda: stack.gateway.plane.lines)
        async with stack.engines["bf16"].serving(port=free_port):
            assert await asking == "assistant:bf16"


async def test_replicas_are_found_by_name_and_come_and_go(
    free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.app.INTERVAL_S", 0.05)
    addresses: list[str] = []
    looks = 0

    async def resolver(host: str, port: int) -> list[str]:
        nonlocal looks
        looks += 1
        assert (host, port) == ("engines.test", free_port)
        if not addresses:
            raise OSError("no such name")
        return list(addresses)

    pools = {"bf16": (f"dns+http://engines.test:{free_port}",)}
    async with running_gateway(pools=pools, discovery=Discovery(resolver)) as stack:
        bf16 = stack.engines["bf16"]

        def names() -> list[str]:
            return [
                replica.name
                for replica in stack.gateway.plane.snapshot.pools.by_variant["assistant:bf16"].replicas
            ]

        async with stack.post() as response:
            assert response.status == 503, "nothing is known yet"
        async with bf16.serving(free_port, "127.0.0.2"), bf16.serving(free_port, "127.0.0.3"):
            addresses[:] = ["127.0.0.2", "127.0.0.3"]
            await eventually(lambda: names() == ["assistant:bf16-0", "assistant:bf16-1"])
            kept = stack.gateway.plane.snapshot.pools.by_variant["assistant:bf16"].replicas[1]
            assert await _variant(stack, "core") == "assistant:bf16"
            addresses[:] = ["127.0.0.3"]
            await eventually(lambda: names() == ["assistant:bf16-1"])
            assert stack.gateway.plane.snapshot.pools.by_variant["assistant:bf16"].replicas[0] is kept
            assert await _variant(stack, "core") == "assistant:bf16"
            addresses[:] = ["127.0.0.3", "127.0.0.4"]
            await eventually(lambda: names() == ["assistant:bf16-1", "assistant:bf16-0"])
            addresses.clear()
            seen = looks
            await eventually(lambda: looks > seen + 2)
            assert len(names()) == 2, "a resolver that fails takes nothing away"


async def test_a_slow_replica_is_hedged_and_the_loser_cancelled() -> None:
    async with running_gateway() as spare:
        fast = spare.engines["bf16"]
        async with fast.serving() as url:
            roles = {"core": {"hedge": True}, "summarizer": {}, "intent_classifier": {}}
            async with running_gateway() as slow_one:
                slow = slow_one.engines["bf16"]
                async with slow.serving() as slow_url:
                    changes = {"roles": roles, "gateway": {"policy": "round_robin", "hedge_share": 1.0}}
                    async with running_gateway(pools={"bf16": (slow_url, url)}, **changes) as stack:
                        for _ in range(30):
                            assert await _variant(stack, "core") == "assistant:bf16"
                        labels = {"role": "core", "variant": "bf16"}
                        # A busy machine may have made one of those slow as well.
                        before = stack.sample("tiercel_hedges_total", **labels, winner="second")
                        slow.script.first_token_delay_s = 60
                        async with asyncio.timeout(25):
                            for _ in range(4):
                                assert await _variant(stack, "core") == "assistant:bf16"
                        await eventually(lambda: slow.running == 0)
                        assert slow.aborted >= 2, "every other request began there"
                        hedged = stack.sample("tiercel_hedges_total", **labels, winner="second")
                        assert hedged - before == 2
                        assert stack.requests("200") == 34
                        used = stack.sample("tiercel_tokens_total", **labels, kind="completion")
                        assert used == 34 * 4, "one answer each is on the books"


async def test_a_route_is_explained_without_asking_an_engine() -> None:
    async with running_gateway() as stack:
        body = {"model": "assistant"}
        headers = {"x-agent-role": "summarizer"}
        async with stack.http.post(stack.url + "/v1/route", json=body, headers=headers) as response:
            found = await response.json()
        assert (found["role"], found["variant"], found["reason"]) == (
            "summarizer",
            "assistant:int8",
            "cheapest_in_budget",
        )
        verdicts = {step["variant"]: step["verdict"] for step in found["considered"]}
        assert verdicts == {
            "assistant:int4-kv8": "not_enough_evidence",
            "assistant:int8": "passed",
            "assistant:bf16": "reference",
        }
        async with stack.http.post(stack.url + "/v1/route", json={}) as response:
            assert response.status == 400
            assert (await response.json())["error"]["param"] == "model"
        assert not any(engine.requests for engine in stack.engines.values())


async def _variant(stack: Any, role: str) -> str:
    async with stack.post({"model": role if role != "core" else "assistant"}) as response:
        await response.read()
        assert response.status == 200
        return str(response.headers["x-tiercel-variant"])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_large_body_reaches_the_engine_as_it_was_sent(stream: bool) -> None:
    """It is looked at as it comes, cut anywhere, and not copied."""
    said = "größe 👋 " * 200_000
    async with running_gateway() as stack:
        body = {"messages": [{"role": "user", "content": said}], "stream": stream, "user": "somebody"}
        async with _send(stack, json.dumps(body, ensure_ascii=False).encode()) as response:
            assert response.status == 200
            await response.read()
        (asked,) = from_clients(stack.engines["bf16"])
        assert asked["messages"] == body["messages"]
        assert asked["user"] == "somebody"
        async with stack.post() as response:
            assert response.status == 200, "and the connections go on"


@pytest.mark.parametrize("end", [b"\xff", b"\xc3"])
async def test_a_large_body_that_is_no_text_is_refused(end: bytes) -> None:
    async with running_gateway() as stack:
        body = b'{"messages":[{"role":"user","content":"%b%b"}]}' % ("ä".encode() * 500_000, end)
        async with _send(stack, body) as response:
            assert response.status == 400
            assert "not valid JSON" in (await response.json())["error"]["message"]
        assert not from_clients(stack.engines["bf16"])
        async with _send(stack, b'{"x": "\xff"}') as response:
            assert response.status == 400, "also a small one after a large one"


def _send(stack: Stack, body: bytes) -> Any:
    headers = {"content-type": "application/json"}
    return stack.http.post(stack.url + CHAT, data=io.BytesIO(body), headers=headers)
