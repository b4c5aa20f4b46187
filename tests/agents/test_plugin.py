"""The plugin in somebody else's ADK app: identity is added, nothing else changes, nothing fails."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from google.adk.agents import LlmAgent
from google.adk.apps import App
from google.adk.models.lite_llm import LiteLlm, LiteLLMClient
from google.adk.models.llm_request import LlmRequest
from google.adk.runners import InMemoryRunner
from google.genai import types

from tiercel_agents.adk import GatewayPlugin
from tiercel_agents.adk.client import GatewayCall, GatewayClient, keep_quiet


def context(**known: Any) -> Any:
    return SimpleNamespace(**known)


FULL = {"agent_name": "core", "session": SimpleNamespace(id="s1"), "invocation_id": "i1"}


async def close_connections() -> None:
    """LiteLLM keeps connections open for the whole process."""
    import litellm

    await litellm.close_litellm_async_clients()


async def headers_after(llm_request: LlmRequest, callback_context: Any) -> dict[str, str]:
    await GatewayPlugin().before_model_callback(callback_context=callback_context, llm_request=llm_request)
    options = llm_request.config.http_options
    return dict(options.headers or {}) if options else {}


async def test_a_plain_litellm_agent_carries_its_identity_to_the_gateway(gateway: Any) -> None:
    keep_quiet()
    calls: list[GatewayCall] = []
    for client in ({}, {"llm_client": GatewayClient(calls.append)}):
        model = LiteLlm(model="openai/assistant", api_base=f"{gateway.url}/v1", api_key="k", **client)
        agent = LlmAgent(name="triage", model=model, instruction="Sort it.")
        app = App(name="shop", root_agent=agent, plugins=[GatewayPlugin()])
        async with InMemoryRunner(app=app) as runner:
            session = await runner.session_service.create_session(app_name="shop", user_id="u")
            message = types.Content(role="user", parts=[types.Part(text="hello")])
            texts = [
                part.text
                async for event in runner.run_async(user_id="u", session_id=session.id, new_message=message)
                for part in event.content.parts
            ]
        assert texts == ["a word"]
        headers = gateway.seen[-1].headers
        assert headers["x-agent-name"] == "triage"
        assert headers["x-session-id"] == session.id
        assert headers["x-invocation-id"].startswith("e-")
        assert headers["baggage"] == "gen_ai.agent.name=triage"
    await close_connections()
    (call,) = calls
    assert (call.agent, call.variant, call.replica, call.completion_tokens) == (
        "triage",
        "assistant:bf16",
        "r0",
        2,
    )
    assert call.ttft_s is None, "the answer was not streamed"


async def test_the_applications_own_headers_win() -> None:
    shared = types.HttpOptions(headers={"X-Session-ID": "mine", "baggage": "tenant=7"})
    llm_request = LlmRequest(config=types.GenerateContentConfig(http_options=shared))
    assert await headers_after(llm_request, context(**FULL)) == {
        "X-Session-ID": "mine",
        "baggage": "tenant=7,gen_ai.agent.name=core",
        "x-agent-name": "core",
        "x-invocation-id": "i1",
    }
    assert shared.headers == {"X-Session-ID": "mine", "baggage": "tenant=7"}, (
        "shared options stay as they are"
    )


@pytest.mark.parametrize(
    ("known", "headers"),
    [
        ({}, {}),
        ({"agent_name": None, "session": None, "invocation_id": ""}, {}),
        ({"session": SimpleNamespace(id="s1")}, {"x-session-id": "s1"}),
        ({"session": SimpleNamespace(id="a\r\nx: ü")}, {"x-session-id": "a%0D%0Ax: %C3%BC"}),
        ({"agent_name": "a,b"}, {"x-agent-name": "a,b", "baggage": "gen_ai.agent.name=a%2Cb"}),
    ],
)
async def test_what_is_unknown_is_left_out_and_what_is_odd_is_encoded(
    known: dict[str, Any], headers: dict[str, str]
) -> None:
    assert await headers_after(LlmRequest(), context(**known)) == headers


async def test_a_request_it_does_not_understand_goes_out_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    await GatewayPlugin().before_model_callback(callback_context=context(**FULL), llm_request=object())
    assert "without its agent's identity" in caplog.text


async def answered(on_call: Any, monkeypatch: pytest.MonkeyPatch, made: Any, **more: Any) -> Any:
    """What ``GatewayClient`` gives for LiteLLM's answer ``made``."""

    async def acompletion(*_: Any, **__: Any) -> Any:
        return await made() if callable(made) else made

    monkeypatch.setattr(LiteLLMClient, "acompletion", acompletion)
    return await GatewayClient(on_call).acompletion("openai/assistant", [], None, **more)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_report_that_fails_breaks_no_answer(
    stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def on_call(_: GatewayCall) -> None:
        raise OSError("the disk is full")

    async def chunks() -> Any:
        yield SimpleNamespace(choices=[SimpleNamespace(delta=None)], usage=None)
        yield SimpleNamespace(choices=None, usage=SimpleNamespace())

    given = chunks() if stream else SimpleNamespace(usage=None)
    answer = await answered(on_call, monkeypatch, given, stream=stream)
    if stream:
        assert len([chunk async for chunk in answer]) == 2
    else:
        assert answer is given
    assert "the disk is full" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_is_cancelled_is_reported(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time limit of the application's ends calls so."""
    calls: list[GatewayCall] = []

    async def never() -> Any:
        await asyncio.sleep(3600)

    async def chunks() -> Any:
        yield SimpleNamespace(choices=[], usage=None)
        await never()

    async def read() -> None:
        answer = await answered(calls.append, monkeypatch, chunks() if stream else never, stream=stream)
        async for _ in answer:
            pass

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(read(), 0.05)
    assert [call.error for call in calls] == ["CancelledError"]
