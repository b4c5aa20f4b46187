"""LiteLLM itself: its own mock, its thread, and when it is imported."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from dialects import WEATHER, ProviderServer
from gateway_stack import running_gateway
from hypothesis import given
from hypothesis import strategies as st
from openai_schema import CHUNK, WHOLE, check
from provider_stack import (
    KEY,
    OPENAI,
    Providers,
    provided,
)

from gateway.app import Gateway
from gateway.proxy.body import Body
from gateway.upstream import litellm
from gateway.upstream.providers.library import import_litellm


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Before a test's own time limits begin."""
    import_litellm()


@pytest.fixture
async def one(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Providers]:
    """Where the sample does not matter."""
    monkeypatch.setenv("PROVIDER_KEY", KEY)
    async with provided() as running:
        yield running


# LiteLLM's own mock


@pytest.fixture
async def mocked(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Providers, dict[str, Any]]]:
    """A gateway whose LiteLLM answers by itself, as ``mock`` says; no client can have it do that."""
    entry = {"model": "mock", "litellm_model": "openai/gpt-4o"}
    mock: dict[str, Any] = {}
    async with running_gateway(providers=(entry,), quality={"sample_rate": 0.0}) as stack:
        module: Any = sys.modules["litellm"]
        complete = module.acompletion

        async def mocked_complete(**given: Any) -> Any:
            answer = await complete(**given, **mock)
            if given.get("stream"):  # of which the mock never says that it is complete
                answer.received_finish_reason = "stop"
            return answer

        monkeypatch.setattr(module, "acompletion", mocked_complete)
        yield Providers(stack, ProviderServer()), mock


async def test_litellms_own_mock(mocked: tuple[Providers, dict[str, Any]]) -> None:
    providers, mock = mocked
    mock["mock_response"] = "Said by nobody."
    answer = await providers.whole("mock")
    check(answer, WHOLE)
    assert answer["choices"][0]["message"]["content"] == "Said by nobody."
    events = await providers.stream("mock", stream_options={"include_usage": True})
    for event in events:
        check(event, CHUNK)
    said = [c["delta"].get("content") or "" for e in events for c in e["choices"]]
    assert "".join(said) == "Said by nobody."
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    mock.update(mock_tool_calls=[{"id": "call_1", "type": "function", "function": function}])
    answer = await providers.whole("mock", tools=[WEATHER])
    check(answer, WHOLE)
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"] == function
    mock.clear()
    for said_error, status in (
        ("litellm.RateLimitError", 429),
        ("litellm.ContextWindowExceededError", 400),
        ("litellm.InternalServerError", 502),
    ):
        mock["mock_response"] = said_error
        got, _, _ = await providers.failed("mock")
        assert got == status, said_error


# large bodies


async def test_a_large_body_is_made_objects_of_elsewhere(
    one: Providers, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    real = Body.everything

    def everything(body: Body) -> dict[str, Any]:
        threads.append(threading.current_thread())
        return real(body)

    monkeypatch.setattr(Body, "everything", everything)
    large = {"role": "user", "content": "x" * litellm.SMALL_BYTES}
    for messages in ([large], [large] * 10, [{"role": "user", "content": "x"}]):
        answer = await one.whole(OPENAI, messages=messages)
        assert answer["choices"][0]["message"]["content"] == "It is a fine day."
        assert one.server.requests[-1]["messages"] == messages
    assert await one.stream(OPENAI, messages=[large])
    here = threading.current_thread()
    assert [thread is here for thread in threads] == [False, False, True, False]


async def test_what_is_wrong_with_a_large_body_is_said_as_of_a_small_one(
    one: Providers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(litellm, "MOST_VALUES", 30_000)
    large = {"role": "user", "content": "x" * litellm.SMALL_BYTES}
    asked = len(one.server.requests)
    for stream in (False, True):
        status, error, _ = await one.failed(OPENAI, messages=[large], tools=[{"type": "mcp"}], stream=stream)
        assert (status, error["param"]) == (400, "tools[0]")
    status, error, _ = await one.failed(OPENAI, messages=[[]] * 40_000)
    assert status == 400
    assert "gpt takes 30,000" in error["message"]
    assert len(one.server.requests) == asked
    await one.whole(OPENAI)
    replica = one.stack.gateway.plane.snapshot.pools.providers[OPENAI]
    assert replica.mine == 0
    assert replica.breaker.no_failures


LETTERS = st.text(alphabet='"\\,[]{}:é1 x', max_size=12)
VALUES = st.recursive(
    st.none() | st.integers() | LETTERS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(LETTERS, inner, max_size=4),
    max_leaves=20,
)


def values(value: Any) -> int:
    """An empty list or object counts twice."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 1 if inner is None else 1 + (sum(map(values, inner)) or 1)


@given(value=VALUES, window=st.integers(2, 40))
def test_values_are_counted_without_being_made(value: Any, window: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(litellm, "_WINDOW", window)
        raw = json.dumps(value).encode()
        assert litellm._values(raw) == values(value)
        assert litellm._values(raw[:-1]) <= values(value), "one that is cut off comes to an end"


# LiteLLM itself


def test_without_providers_litellm_is_not_imported() -> None:
    """In a process of its own, since others here import it."""
    code = (
        "import sys; sys.path.insert(0, 'tests/gateway'); import gateway_stack as g; "
        "from gateway.app import Gateway; Gateway(g.make_config(), g.make_cards()); "
        "print('litellm' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


async def test_the_loop_goes_on_while_a_provider_blocks_litellms(one: Providers) -> None:
    """Whatever LiteLLM waits for over a blocking connection, other clients do not."""
    library = one.stack.gateway.providers._library
    over = threading.Event()
    library.start_soon(_blocks(over))
    try:
        async with asyncio.timeout(25):
            for _ in range(3):
                async with one.stack.post() as response:
                    assert response.status == 200
    finally:
        over.set()


async def _blocks(over: threading.Event) -> None:
    over.wait(60)


def test_gateways_come_and_go() -> None:
    """Loops of their own, one after the other: nothing of the last one's is used again."""

    async def once() -> None:
        server = ProviderServer()
        async with server.serving() as url:
            entry = {"model": "m", "litellm_model": "openai/x", "api_base": url + "/v1"}
            async with running_gateway(providers=(entry,)) as stack:
                await Providers(stack, server).whole("m")
                gateway: Gateway = stack.gateway
            assert gateway.providers._library._thread is None

    for _ in range(2):
        asyncio.run(once())
