"""A Google ADK agent with a tool, as its documents show one, against the gateway and an engine."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway.dialects import ProviderServer, Script
from tests.gateway.gateway_stack import OTHERS, addresses, running_gateway


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
async def test_an_agent_calls_its_tool(streaming: bool) -> None:
    from google.adk.agents import LlmAgent
    from google.adk.agents.run_config import RunConfig, StreamingMode
    from google.adk.models.lite_llm import LiteLlm
    from google.adk.runners import InMemoryRunner
    from google.genai import types

    asked: list[str] = []

    def weather(city: str) -> dict[str, str]:
        """The weather in a city."""
        asked.append(city)
        return {"weather": "fine"}

    engine = ProviderServer(Script(calls=({"city": "Oslo"},)))
    async with engine.serving(also=OTHERS) as url:
        pools = addresses(url)
        async with running_gateway(pools=pools, watch={"enabled": False}) as stack:
            model = LiteLlm(model="openai/assistant", api_base=stack.url + "/v1", api_key="none")
            agent = LlmAgent(name="helper", model=model, instruction="Help.", tools=[weather])
            runner = InMemoryRunner(agent=agent, app_name="app")
            session = await runner.session_service.create_session(app_name="app", user_id="u")
            mode = StreamingMode.SSE if streaming else StreamingMode.NONE
            said = ""
            async for event in runner.run_async(
                user_id="u",
                session_id=session.id,
                new_message=types.Content(role="user", parts=[types.Part(text="How is it in Oslo?")]),
                run_config=RunConfig(streaming_mode=mode),
            ):
                if event.is_final_response() and event.content:
                    said = "".join(part.text or "" for part in event.content.parts or ())
    assert asked == ["Oslo"]
    assert said == "It is a fine day."
    first, second = engine.requests
    assert first["tools"][0]["function"]["name"] == "weather"
    messages: list[Any] = second["messages"]
    assert [message["role"] for message in messages[-2:]] == ["assistant", "tool"]
