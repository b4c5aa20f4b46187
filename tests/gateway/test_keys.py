"""API keys: who may do what, and whose tokens are whose."""

from __future__ import annotations

from typing import Any

import pytest
from gateway_stack import CHAT, Stack, eventually, make_config, running_gateway
from pydantic import ValidationError

from gateway.identity import hash_of


def key(name: str, **more: Any) -> dict[str, Any]:
    """A key whose secret is ``sk-`` and its name."""
    return {"name": name, "sha256": hash_of(f"sk-{name}")} | more


KEYS = (
    key("open", tenant="acme"),
    key("other", tenant="globex"),
    key("bound", role="intent_classifier"),
    key("few", roles=("summarizer",), default_role="summarizer"),
    key("models", models=("assistant",)),
    key("low", lowest="int8"),
    key("admin", admin=True),
)


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer sk-{name}"}


async def status_of(stack: Stack, name: str, body: dict[str, Any] | None = None, **headers: str) -> Any:
    async with stack.post(body, headers=bearer(name) | headers) as response:
        answer = await response.json()
        return response.status if response.status != 200 else response.headers["x-tiercel-variant"], answer


async def test_keys() -> None:
    async with running_gateway(keys=KEYS) as stack:
        for headers in ({}, {"authorization": "Bearer sk-nobody"}, {"authorization": "Basic sk-open"}):
            async with stack.post(headers=headers) as response:
                assert response.status == 401
                assert response.headers["www-authenticate"] == "Bearer"
                assert (await response.json())["error"]["code"] == "invalid_api_key"
        async with stack.post({"model": 7}, headers={}) as response:
            assert response.status == 401, "strangers learn nothing about their bodies"
        async with stack.post(headers={"x-api-key": "sk-open"}) as response:
            assert response.status == 200, "as Anthropic's client sends it"
        assert (await status_of(stack, "bound", {"model": "summarizer"}))[0] == "assistant:int4-kv8", (
            "its role is bound"
        )
        assert (await status_of(stack, "few"))[0] == "assistant:int8"
        refused = await status_of(stack, "few", {"model": "intent_classifier"})
        assert refused[0] == 403
        assert "may use: summarizer" in refused[1]["error"]["message"]
        assert (await status_of(stack, "models", {"model": "assistant:bf16"}))[0] == "assistant:bf16"
        assert (await status_of(stack, "low", {"model": "assistant:int8"}))[0] == "assistant:int8"
        assert (await status_of(stack, "low", {"model": "assistant:int4-kv8"}))[0] == 403
        assert (await status_of(stack, "open", {"model": "assistant:int8"}))[0] == 403
        assert not any(engine.aborted for engine in stack.engines.values())


async def test_tokens_are_counted_for_each_key_also_of_streams_that_are_cut() -> None:
    async with running_gateway(keys=KEYS, quality={"sample_rate": 0}) as stack:
        labels = {"role": "core", "variant": "bf16", "kind": "completion"}

        def used(name: str) -> float:
            return stack.sample("tiercel_key_tokens_total", key=name, **labels)

        for name, times in (("open", 3), ("other", 2)):
            for _ in range(times):
                assert (await status_of(stack, name))[0] == "assistant:bf16"
        script = stack.engines["bf16"].script
        script.token_delay_s = 600  # no more comes until it is closed
        response = await stack.post({"stream": True}, headers=bearer("admin"))
        seen = await response.content.readuntil(b"\n\n")
        response.close()
        await eventually(lambda: used("admin"))
        script.token_delay_s = 0
        async with stack.post({"stream": True}, headers=bearer("other")) as whole:
            await whole.read()
        assert (used("open"), used("other")) == (12, 12)
        assert used("admin") == seen.count(b"data: ")


async def test_prefix_caches_of_owners_are_apart() -> None:
    """Also those of keys without a tenant: each is an owner of its own."""
    async with running_gateway(keys=(*KEYS, key("beside", tenant="acme"))) as stack:
        for name in ("open", "beside", "other", "bound", "admin", "bound"):
            await status_of(stack, name, {"model": "assistant:bf16"})
        salts = [request.get("cache_salt") for request in stack.asked("bf16")]
        assert salts[0] == salts[1]
        assert salts[0] != salts[2]
        assert len({*salts} - {None}) == 4
        assert salts[3] == salts[5] != salts[4]
        async with stack.post({"cache_salt": salts[2]}, headers=bearer("open")) as response:
            assert response.status == 200
        assert stack.asked("bf16")[-1]["cache_salt"] == salts[0], "nobody picks another's"
        raw = (
            b'{"model": "assistant", "messages": [{"role": "user", "content": "x"}], "cache\\u005fsalt": "a"}'
        )
        headers = bearer("open") | {"content-type": "application/json"}
        async with stack.http.post(stack.url + "/v1/chat/completions", data=raw, headers=headers) as response:
            assert response.status == 200
        assert stack.asked("bf16")[-1]["cache_salt"] == salts[0], "in no spelling"


async def test_without_keys_there_is_one_owner() -> None:
    async with running_gateway() as stack:
        async with stack.post({"model": "assistant:bf16"}) as response:
            assert response.status == 200
        assert "cache_salt" not in stack.asked("bf16")[-1]


async def test_no_client_goes_ahead_of_others() -> None:
    """Engines run with priority scheduling: whoever could choose would go before all others."""
    keys = (key("plain"), key("batch", priority=50))
    async with running_gateway(keys=keys, watch={"rate": 0}) as stack:
        engine = stack.engines["bf16"]

        async def sent(name: str, text: str = "") -> tuple[Any, Any]:
            """The priority that the engine was sent in the body, and as vLLM's header."""
            raw = '{"model": "assistant", "messages": [{"role": "user", "content": "x"}]' + text + "}"
            headers = bearer(name) | {"content-type": "application/json", "x-vllm-priority": "-9"}
            before = len(engine.requests)
            async with stack.http.post(stack.url + CHAT, data=raw, headers=headers) as response:
                assert response.status == 200, await response.text()
            assert len(engine.requests) == before + 1
            return engine.requests[before].get("priority"), engine.headers[before].get("x-vllm-priority")

        assert await sent("plain") == (None, None), "an engine that knows none is sent none"
        assert await sent("plain", ', "priority": -5') == (0, None)
        assert await sent("plain", ', "prio\\u0072ity": -5') == (0, None), "in no spelling"
        assert await sent("plain", ', "priority": "-5"') == (0, None)
        assert await sent("plain", ', "priority": 5, "priority": -5') == (0, None)
        assert await sent("plain", ', "priority": 7') == (7, "7"), "behind others it may go"
        assert await sent("batch") == (50, "50")
        assert await sent("batch", ', "priority": 1') == (50, "50")
        assert await sent("batch", ', "priority": 60') == (60, "60")


async def test_a_limit_on_models_holds_by_whatever_name() -> None:
    """As a model of a provider's, an adapter, a role, a variant, or by a role's header."""
    adapters, providers = {"legal": {}}, ({"model": "gpt", "litellm_model": "openai/gpt"},)
    keys = (key("base", models=("assistant",)), key("adapter", models=("legal",)))
    async with running_gateway(keys=keys, adapters=adapters, providers=providers) as stack:
        for name, model, status in (
            ("base", "assistant", "assistant:bf16"),
            ("base", "summarizer", "assistant:int8"),
            ("base", "assistant:bf16", "assistant:bf16"),
            ("base", "legal", 403),
            ("base", "gpt", 403),
            ("adapter", "legal", "assistant:bf16"),
            ("adapter", "assistant", 403),
            ("adapter", "core", 403),
            ("adapter", "assistant:bf16", 403),
            ("adapter", "legal:bf16", 403),
            ("adapter", "gpt", 403),
        ):
            assert (await status_of(stack, name, {"model": model}))[0] == status, (name, model)
        headers = {"x-agent-role": "summarizer"}
        assert (await status_of(stack, "adapter", {"model": "assistant"}, **headers))[0] == 403
        async with stack.http.post(
            stack.url + "/v1/route", json={"model": "assistant"}, headers=bearer("adapter")
        ) as response:
            assert response.status == 403, "nor is it told of it"


async def test_pages_ask_for_keys_too() -> None:
    async with running_gateway(keys=KEYS) as stack:
        for path, name, status in (
            ("/v1/models", None, 401),
            ("/v1/models", "open", 200),
            ("/admin/config", "open", 403),
            ("/admin/config", "admin", 200),
            ("/health", None, 200),
            ("/metrics", None, 200),
        ):
            headers = bearer(name) if name else {}
            async with stack.http.get(stack.url + path, headers=headers) as response:
                assert response.status == status, path
                assert "sha256" not in (await response.text()) or path == "/admin/config"
                for secret in KEYS:
                    assert secret["sha256"] not in await response.text()


BAD = [
    ({"gateway": {"host": "0.0.0.0"}}, "can be reached from other machines and there are no keys"),
    ({"keys": [key("a"), key("a")]}, "listed twice"),
    ({"keys": [key("a", role="boss")]}, "'boss' is not a role"),
    ({"keys": [key("a", roles=["core"], default_role="summarizer")]}, "is not among its roles"),
    ({"keys": [key("a", lowest="int2")]}, "'int2' is not a served variant"),
    ({"keys": [key("a", models=["assistant:int2"])]}, "'assistant:int2' does not exist; known: assistant, "),
    ({"keys": [key("a", priority=1000)]}, "priority"),
    ({"keys": [{"name": "a", "sha256": "sk-plain-text"}]}, "sha256"),
    ({"pools": {"int8": ["10.0.0.1:8000"]}}, "is no URL of an engine; give http://HOST:PORT"),
    ({"pools": {"int8": ["http://[::1"]}}, "pools.assistant:int8: '…' is no URL .Invalid IPv6 URL"),
    ({"pools": {"int8": ["http://h:99999"]}}, "pools.assistant:int8: 'http://h:99999' is no URL"),
    ({"gateway": {"policy": "fastest"}}, "is not a policy; use one of: round_robin"),
    ({"gateway": {"tls_key": "a.pem"}}, "belong together"),
    ({"roles": {"core": {"canary": {"variant": "w2", "percent": 5}}}, "default_role": "core"}, "'w2' is not"),
]


@pytest.mark.parametrize(("changes", "says"), BAD)
def test_bad_configurations(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        make_config(**changes)


def test_other_addresses_need_keys() -> None:
    make_config(gateway={"host": "0.0.0.0"}, keys=KEYS)
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        make_config(gateway={"host": host})


async def test_one_tenants_requests_take_no_replica_away_from_others() -> None:
    """Some requests make a sound engine answer 500."""
    async with running_gateway(keys=KEYS) as stack:
        engine = stack.engines["bf16"]
        engine.script.status = 500
        for _ in range(8):
            assert (await status_of(stack, "open"))[0] == 502
        engine.script.status = 200
        assert (await status_of(stack, "other"))[0] == "assistant:bf16"
