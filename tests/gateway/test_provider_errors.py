"""What becomes of a provider's failures: the client's answer, the wait, the breaker; and of its secrets."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from email.utils import formatdate
from typing import Any

import pytest
from dialects import ProviderServer, Script
from gateway_stack import eventually, running_gateway
from provider_stack import (
    CLAUDE,
    DIALECTS,
    GEMINI,
    KEY,
    OPENAI,
    PASSWORD,
    Providers,
    provided,
)

from gateway.config import Provider
from gateway.upstream.providers.library import import_litellm


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Before a test's own time limits begin."""
    import_litellm()


@pytest.fixture(params=[0.0, 1.0], ids=["unread", "sampled"])
async def providers(request: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Providers]:
    monkeypatch.setenv("PROVIDER_KEY", KEY)
    async with provided(quality={"sample_rate": request.param}) as running:
        yield running


@pytest.fixture
async def one(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Providers]:
    """Where the sample does not matter."""
    monkeypatch.setenv("PROVIDER_KEY", KEY)
    async with provided() as running:
        yield running


# failures

SEEN = {
    400: 400,
    401: 502,
    402: 502,
    403: 502,
    404: 502,
    408: 504,
    409: 409,
    413: 413,
    422: 422,
    429: 429,
    500: 502,
    502: 502,
    503: 503,
    504: 504,
    529: 503,
}


async def test_the_providers_status(providers: Providers) -> None:
    for model in DIALECTS:
        for status, seen in SEEN.items():
            for stream in (False, True):
                providers.set(status=status, headers={"retry-after": "37"})
                got, error, headers = await providers.failed(model, stream=stream)
                assert got == seen, (model, status, stream, error)
                assert len(providers.server.requests) == 1, "what reached a provider is not asked again"
                assert headers.get("retry-after") == (
                    "37" if seen in (400, 409, 413, 422, 429, 503) else None
                )
                if seen < 500:
                    assert error["message"] == "scripted failure"
            # Its errors are not what this test is about.
            providers.stack.gateway.plane.snapshot.pools.providers[model].breaker.answered()


async def test_a_content_policy_is_about_the_request(one: Providers) -> None:
    said = {"error": {"message": "flagged by moderation", "code": "content_policy_violation"}}
    one.set(status=403, error=said)
    status, error, _ = await one.failed(OPENAI)
    assert (status, error["code"]) == (403, "content_policy_violation")


@pytest.mark.parametrize(
    ("headers", "seconds", "milliseconds"),
    [
        ([("retry-after", "7")], "7", None),
        ([("retry-after", "1.2")], "2", None),
        ([("retry-after-ms", "1500")], "2", "1500"),
        ([("retry-after-ms", "1500"), ("retry-after", "3")], "3", "1500"),
        ([("retry-after", "7"), ("retry-after", "9")], "7", None),
        ([("retry-after", "soon"), ("retry-after", "9")], "9", None),
        ([("retry-after", "-4")], None, None),
        ([("retry-after", "1e400")], None, None),
        ([("retry-after", "9" * 5000)], None, None),
        ([("retry-after", "")], None, None),
        ([("retry-after", "99999999999")], "86400", None),
        ([("retry-after", "Thu, 99 Foo 2026 00:00:00 GMT"), ("retry-after-ms", "nan")], None, None),
        ([("retry-after", formatdate(0, usegmt=True))], "0", None),
    ],
)
async def test_the_wait(one: Providers, headers: Any, seconds: str | None, milliseconds: str | None) -> None:
    for status in (429, 503):
        one.set(status=status, headers=headers)
        for stream in (False, True):
            got, _, answered = await one.failed(OPENAI, stream=stream)
            assert got == status
            assert answered.get("retry-after") == seconds
            assert answered.get("retry-after-ms") == milliseconds


async def test_the_wait_as_a_date(one: Providers) -> None:
    one.set(status=429, headers={"retry-after": formatdate(time.time() + 1000, usegmt=True)})
    _, _, headers = await one.failed(OPENAI)
    assert 900 < int(headers["retry-after"]) <= 1001


async def test_what_is_no_answer(providers: Providers) -> None:
    for model in DIALECTS:
        for stream in (False, True):
            for how in ({"garbage": True}, {"die_after": 0}):
                providers.set(**how)
                status, error, _ = await providers.failed(model, stream=stream)
                assert (status, error["type"]) == (502, "upstream_error"), (model, stream, how)
        providers.stack.gateway.plane.snapshot.pools.providers[model].breaker.answered()


async def test_half_a_stream(providers: Providers) -> None:
    """Cut off, or merely at an end too early: LiteLLM says ``stop`` in the provider's place."""

    async def cut(model: str, **how: int) -> list[Any]:
        """The events of a stream that is cut once the client has its beginning."""
        begun = asyncio.Event()
        providers.set(until=begun, text="a b c d e f g h", **how)
        async with providers.stack.post({"model": model, "stream": True}) as response:
            assert response.status == 200
            begun.set()
            return list(await providers.stack.events(response))

    for model in DIALECTS:
        events = await cut(model, die_after=3)
        assert "error" in events[-1], (model, events)
        assert not any(c["finish_reason"] for e in events[:-1] for c in e["choices"])
        if model == GEMINI:  # whose dialect has no end but this
            continue
        events = await cut(model, end_after=4)
        assert "error" in events[-1], (model, events)
        providers.stack.gateway.plane.snapshot.pools.providers[model].breaker.answered()


async def test_a_provider_that_is_not_there(one: Providers) -> None:
    gone = {"model": "gone", "litellm_model": "openai/x", "api_base": "http://127.0.0.1:9/v1"}
    async with running_gateway(providers=(gone,)) as stack:
        status, error, _ = await Providers(stack, one.server).failed("gone")
        assert status == 502
        assert "cannot be reached" in error["message"]
        assert not stack.gateway.plane.snapshot.pools.providers["gone"].breaker.closed


async def test_no_answer_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROVIDER_KEY", KEY)
    limits = {"first_byte_timeout_s": 0.5, "answer_timeout_s": 0.5}
    async with provided(gateway=limits) as providers:
        for model in (OPENAI, CLAUDE):
            for stream in (False, True):
                providers.set(delay_s=60)
                assert (await providers.failed(model, stream=stream))[0] == 504
            await eventually(lambda: providers.server.running == 0)


async def test_silence_within_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROVIDER_KEY", KEY)
    async with provided(gateway={"idle_timeout_s": 0.5}) as providers:
        for model in (OPENAI, CLAUDE):
            providers.set(silent_after=4)
            async with providers.stack.post({"model": model, "stream": True}) as response:
                assert response.status == 200
                events = await providers.stack.events(response)
            assert events[-1]["error"]["code"] == "upstream_timeout"
            await eventually(lambda: providers.server.running == 0)


async def test_our_settings_and_a_full_provider_are_no_reason_to_refuse_others(one: Providers) -> None:
    breaker = one.stack.gateway.plane.snapshot.pools.providers[OPENAI].breaker
    for status in (401, 404, 429, 503, 400):
        for _ in range(4):
            one.set(status=status)
            assert (await one.failed(OPENAI))[0] == SEEN[status]
            assert breaker.closed
    one.set()
    await one.whole(OPENAI)
    for _ in range(3):
        one.set(status=500)
        assert (await one.failed(OPENAI))[0] == 502
    assert not breaker.closed


# secrets


async def test_secrets_stay_here(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A provider that says what it was sent: the key is in its words, and nowhere else."""
    monkeypatch.setenv("PROVIDER_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    server = ProviderServer()
    async with server.serving() as url:
        base = url.replace("http://", f"http://someone:{PASSWORD}@")
        entry = {"litellm_model": "openai/x", "api_base": base + "/v1"}
        keyed = entry | {"model": "keyed", "api_base": url + "/v1", "api_key_env": "PROVIDER_KEY"}
        listed = (keyed, entry | {"model": "basic"})
        assert PASSWORD not in repr([Provider.model_validate(one) for one in listed])
        async with running_gateway(providers=listed) as stack:
            for status in (400, 401, 403, 404, 422, 429, 500, 503):
                said = {"error": {"message": "you sent {authorization}", "code": "{authorization}"}}
                server.script = Script(status=status, error=said)
                for model in ("keyed", "basic"):
                    for stream in (False, True):
                        async with stack.post({"model": model, "stream": stream}) as response:
                            seen = await response.text() + str(response.headers)
                        for secret in (KEY, PASSWORD, base, "c29tZW9uZTpodW50ZXIy"):
                            assert secret not in seen, (status, model)
            async with stack.http.get(stack.url + "/metrics") as response:
                metrics = await response.text()
            records = caplog.text + "".join(str(record.__dict__) for record in caplog.records)
        assert any(KEY in str(headers) for headers in server.headers)
    ours = [r for r in caplog.records if r.name.startswith(("tiercel", "gateway"))]
    for secret in (KEY, PASSWORD):
        assert secret not in metrics
        assert not [r for r in ours if secret in str(r.__dict__)]
    assert KEY not in records
