"""What docs/agents.md shows is true: its code runs against a gateway, its YAML is valid."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import yaml
from google.adk.agents import LlmAgent
from google.adk.apps import App
from google.adk.runners import InMemoryRunner
from google.genai import types

from gateway.config import RoleSettings
from tiercel_agents.roles import library

PAGE = (Path(__file__).parents[2] / "docs" / "agents.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


async def test_the_code_runs(gateway: Any) -> None:
    names: dict[str, Any] = {}
    for block in blocks("python"):
        await asyncio.to_thread(exec, block.replace("http://127.0.0.1:8080", gateway.url), names)
    app: App = names["app"]
    assert isinstance(app.root_agent, LlmAgent)
    app.root_agent.model = names["model"]  # the page's second one, which reports its calls
    async with InMemoryRunner(app=app) as runner:
        session = await runner.session_service.create_session(app_name="support", user_id="u")
        message = types.Content(role="user", parts=[types.Part(text="where is my order")])
        async for _ in runner.run_async(user_id="u", session_id=session.id, new_message=message):
            pass
    (call,) = names["calls"]
    assert (call.agent, call.variant, call.error) == ("intent_classifier", "assistant:bf16", None)


def test_the_roles_are_valid() -> None:
    named, like = (yaml.safe_load(block)["roles"] for block in blocks("yaml"))
    roles = {name: RoleSettings.model_validate(role) for name, role in named.items()}
    assert roles["intent_classifier"].agents == ("triage", "router")
    roles = {name: RoleSettings.model_validate(role) for name, role in like.items()}
    assert roles["triage"].budget.max_kl == 0.2
    assert (roles["fields"].grounded, roles["fields"].budget.max_accuracy_drop) == (True, 0.01)


def test_the_library_is_shown_whole() -> None:
    for one in library().values():
        (line,) = re.findall(rf"^\| `{one.name}` \|.*$", PAGE, flags=re.MULTILINE)
        budget = one.settings["budget"]
        assert ("max_kl" in budget) == ("KL" in line), line
        assert "max_kl" not in budget or f"KL {budget['max_kl']:g}" in line, line
        assert ("JSON" in line) == (one.schema is not None), line
        assert ("grounded" in line) == bool(one.settings.get("grounded")), line
