"""Keys that engines ask for: each is sent its own and no other, and nobody is shown any."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
import yaml
from aiohttp import web
from gateway_stack import CHAT, Stack, eventually, make_config, running_gateway
from prometheus_client import CollectorRegistry
from pydantic import ValidationError
from test_keys import bearer, key

from gateway.config import Config, ConfigError, WatchSettings, parse_config
from gateway.quality.inquiry import Inquiry
from gateway.routing.discovery import Discovery
from gateway.routing.health import probe
from gateway.routing.replicas import Replica
from gateway.telemetry.engines import EngineReader
from gateway.telemetry.metrics import Metrics
from gateway.upstream.fake import FakeEngine, Script

WORDS = {"a": "pw-of-a", "b": "pẃ-of-b:é", "c": "sk-of-c"}
"""Secrets: of two engines in their URLs, of the third in the environment."""
KEYS = (key("one", tenant="t1", admin=True), key("two", tenant="t2"))
EMBEDDINGS = "/v1/embeddings"


class Asked(FakeEngine):
    """Keeps the authorization of everything that it is asked, by path."""

    def __init__(self) -> None:
        super().__init__(Script())
        self.seen: set[tuple[str, str | None]] = set()

    def app(self) -> web.Application:
        app = super().app()

        @web.middleware
        async def note(request: web.Request, handler: Any) -> Any:
            self.seen.add((request.path, request.headers.get("authorization")))
            return await handler(request)

        app.middlewares.append(note)
        return app


def basic(name: str) -> str:
    return "Basic " + base64.b64encode(f"me:{WORDS[name]}".encode()).decode()


@asynccontextmanager
async def keyed(
    monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> AsyncIterator[tuple[Stack, dict[str, Asked]]]:
    """A gateway over three engines that ask for three keys, and an address where nobody listens."""
    monkeypatch.setenv("ENGINE_KEY", WORDS["c"])
    engines = {name: Asked() for name in WORDS}
    engines["c"].script.key = WORDS["c"]
    async with AsyncExitStack() as exits:
        urls = {name: await exits.enter_async_context(engine.serving()) for name, engine in engines.items()}
        for name in "ab":
            urls[name] = urls[name].replace("http://", f"http://me:{WORDS[name].replace(':', '%3A')}@")
        dead = exits.enter_context(socket.socket())  # nobody listens there, and nobody else can
        dead.bind(("127.0.0.1", 0))
        nobody = f"http://me:pw-of-nobody@127.0.0.1:{dead.getsockname()[1]}"
        gateway = {"engine_key_env": "ENGINE_KEY", "policy": "round_robin", "health_interval_s": 0.05}
        roles = {"core": {"hedge": True}}
        pools = {"bf16": (urls["a"], nobody, urls["b"], urls["c"])}
        settings = {"pools": pools, "keys": KEYS, "roles": roles, "serve": ("bf16",), "gateway": gateway}
        stack = await exits.enter_async_context(running_gateway(**settings | changes))
        yield stack, engines


def secrets() -> list[str]:
    found = [*WORDS.values(), "pw-of-nobody", *(basic(name).removeprefix("Basic ") for name in "ab")]
    return [*found, WORDS["b"].replace(":", "%3A"), "sk-one", "sk-two"]


async def shown(stack: Stack) -> str:
    """What the gateway shows of itself."""
    parts = []
    for path in ("/admin/config", "/admin/overview", "/readiness", "/metrics", "/v1/models", "/v1/route"):
        async with stack.http.get(stack.url + path, headers=bearer("one")) as response:
            parts.append(await response.text())
    async with stack.post(path="/v1/route", headers=bearer("one")) as response:
        parts.append(await response.text())
    gateway = stack.gateway
    pools = gateway.plane.snapshot.pools
    things: list[Any] = [gateway.plane.snapshot, gateway.plane.snapshot.config, pools, *pools.replicas()]
    things += [vars(replica.breaker) for replica in pools.replicas()]
    return "\n".join([*parts, *map(repr, things), *(replica.where for replica in pools.replicas())])


async def test_every_engine_is_sent_its_own_key_and_nobody_is_shown_any(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By retries, hedges, probes, scrapes, the watch, and whoever counts what was cut off."""
    caplog.set_level(logging.DEBUG)
    async with keyed(monkeypatch) as (stack, engines):
        lines: list[Any] = []
        monkeypatch.setattr(stack.gateway.plane.log, "write", lines.append)
        monkeypatch.setattr(stack.gateway.hedging, "delay", lambda *_: 0.0)
        answers: list[str] = []

        async def ask(number: int, path: str, body: Mapping[str, Any]) -> None:
            who = "one" if number % 2 else "two"
            given = {**bearer(who), "proxy-authorization": "Bearer sk-other", "x-api-key": "sk-other"}
            async with stack.post(body, path, headers=given) as response:
                if number % 5 == 0:
                    return  # it leaves
                answers.append(f"{response.status} {response.headers} {await response.text()}")

        for engine in engines.values():
            engine.script.first_token_delay_s = 0.01
        await asyncio.gather(
            *(
                ask(number, path, body)
                for number in range(12)
                for path, body in (
                    (CHAT, {"stream": number % 3 == 0}),
                    (EMBEDDINGS, {"input": "a"}),
                    ("/v1/responses", {"input": "a"}),
                    ("/v1/messages", {"max_tokens": 5}),
                    ("/invocations", {}),
                )
            )
        )

        def everywhere(*paths: str) -> bool:
            return all({path for path, _ in engine.seen} >= set(paths) for engine in engines.values())

        assert everywhere(CHAT, EMBEDDINGS)
        for engine in engines.values():
            engine.script.die_after = 0  # what it has read by then is asked for afterwards
        for number in range(1, 60, 2):
            for replica in stack.gateway.plane.snapshot.pools.replicas():
                replica.breaker.answered()
            await ask(number, CHAT, {})
        await eventually(lambda: everywhere("/tokenize", "/health", "/metrics"))
        for name, engine in engines.items():
            own = f"Bearer {WORDS['c']}" if name == "c" else basic(name)
            assert {sent for _, sent in engine.seen} == {own}, name
        assert any("200" in answer[:3] for answer in answers)
        hedges = [
            stack.sample("tiercel_hedges_total", role="core", variant="bf16", winner=winner)
            for winner in ("first", "second", "none")
        ]
        assert sum(hedges)
        everything = "\n".join([*answers, repr(lines), caplog.text, await shown(stack)])
        assert [secret for secret in secrets() if secret in everything] == []


async def test_an_engine_that_does_not_take_our_key_is_no_clients_mistake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client that is told 401 changes its own key, which is right."""
    monkeypatch.setenv("ENGINE_KEY", "sk-wrong")
    async with running_gateway(keys=KEYS, gateway={"engine_key_env": "ENGINE_KEY"}) as stack:
        lines: list[Any] = []
        monkeypatch.setattr(stack.gateway.plane.log, "write", lines.append)
        stack.engines["bf16"].script.key = WORDS["c"]
        for body in ({}, {"stream": True}):
            async with stack.post(body, headers=bearer("one")) as response:
                said = await response.json()
                assert response.status == 502, said
                assert "gateway.engine_key_env" in said["error"]["message"]
        assert "sk-wrong" not in repr(lines) + repr(said)
        (replica,) = stack.gateway.plane.snapshot.pools.by_variant["assistant:bf16"].replicas
        assert replica.breaker.closed, "it works, and says so itself once the key is right"


async def test_a_key_in_a_url_can_be_changed_and_its_variable_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    async with keyed(monkeypatch) as (stack, engines):
        a = engines["a"]
        a.script.hold = asyncio.Event()
        config = stack.gateway.plane.snapshot.config
        only = {"assistant:bf16": config.pools["assistant:bf16"][:1]}
        cards = stack.gateway.plane.snapshot.cards
        text = config.model_dump(mode="json")

        async def take(**changes: Any) -> None:
            new = Config.model_validate(text | {"pools": only} | changes)
            await stack.gateway.reloads.apply(lambda: (new, cards))

        await take()
        asking = asyncio.ensure_future(stack.post(headers=bearer("two")).__aenter__())
        await eventually(lambda: a.running)
        a.seen.clear()
        await take(pools={"assistant:bf16": [only["assistant:bf16"][0].replace(WORDS["a"], "pw-new")]})
        a.script.hold.set()
        async with await asking as response:
            assert response.status == 200, "what runs is finished"
        async with stack.post(headers=bearer("two")) as response:
            assert response.status == 200
        new = "Basic " + base64.b64encode(b"me:pw-new").decode()
        assert (CHAT, new) in a.seen
        with pytest.raises(ConfigError, match="engine_key_env"):
            await take(gateway=text["gateway"] | {"engine_key_env": "PATH"})


async def test_a_password_goes_with_every_address_of_a_name() -> None:
    async def resolver(host: str, port: int) -> list[str]:
        return ["10.0.0.2", "fd00::1"]

    config = make_config(pools={"bf16": ("dns+http://me:p%3Aw@engines:8000/x",)})
    discovery = Discovery(resolver)
    await discovery.look(config)
    assert discovery.replicas(config, "assistant:bf16") == (
        "http://me:p%3Aw@10.0.0.2:8000/x",
        "http://me:p%3Aw@[fd00::1]:8000/x",
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"gateway": {"engine_key_env": "sk-S3cr3t"}},
        {"responses": {"store_env": "postgresql://me:S3cr3t@host/db"}},
        {"watch": {"store_env": "postgresql://me:S3cr3t@host/db"}},
        {"kept": {"key_env": "S3cr3t+/="}},
        {"providers": [{"model": "m", "litellm_model": "openai/m", "api_key_env": "sk-S3cr3t"}]},
    ],
)
def test_a_secret_where_the_name_of_its_variable_belongs_is_not_shown(changes: dict[str, Any]) -> None:
    raw = make_config().model_dump(mode="json") | changes
    with pytest.raises(ConfigError, match="is no name of an environment variable") as caught:
        parse_config(yaml.safe_dump(raw), "file", make_config().directory)
    assert "S3cr3t" not in str(caught.value)
    with contextlib.suppress(ValidationError):
        Config.model_validate(raw)


async def test_no_engine_sends_our_key_elsewhere(tmp_path: Path) -> None:
    """Who asks it for its health, its figures or its judgement does not follow where it points."""
    followed: list[str] = []

    async def elsewhere(request: web.Request) -> web.Response:
        followed.append(request.path)
        return web.Response(text="{}")

    async def away(request: web.Request) -> web.Response:
        raise web.HTTPTemporaryRedirect(f"/elsewhere{request.path}")

    app = web.Application()
    app.router.add_route("*", "/elsewhere/{path:.*}", elsewhere)
    app.router.add_route("*", "/{path:.*}", away)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        base = f"http://127.0.0.1:{runner.addresses[0][1]}"
        replica = Replica("assistant:int8", "assistant:int8-0", base, lambda: 0.0)
        async with aiohttp.ClientSession() as session:
            await probe(session, replica)
            metrics = Metrics(CollectorRegistry(), ())
            await EngineReader(session, metrics, tmp_path, lambda: 0.0)._read(replica, None)
            inquiry = Inquiry(WatchSettings(), {}, cast(Any, None), metrics)
            inquiry._session = session
            assert (await inquiry._post(replica, "/v1/completions", b"{}"))[0] == 307
    finally:
        await runner.cleanup()
    assert not replica.reachable
    assert followed == []
