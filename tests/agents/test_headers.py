"""What an application says of its agents by itself, and hands on from the protocols it was called by."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import Signals
from tiercel_agents.headers import from_a2a, from_mcp, identity

TRACED = {"traceparent": "00-1-2-01", "baggage": "a=b"}
PAGE = (Path(__file__).parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_what_is_unknown_is_left_out_and_what_is_odd_is_encoded() -> None:
    assert identity() == {}
    assert identity("\ud800") == {"x-agent-name": "?", "baggage": "gen_ai.agent.name=%3F"}
    assert identity("tri,age", "s/1", "s", "core") == {
        "x-agent-name": "tri,age",
        "x-agent-role": "core",
        "x-session-id": "s/1",
        "x-parent-session-id": "s",
        "baggage": "gen_ai.agent.name=tri%2Cage",
    }


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_value_breaks_out_of_its_header(agent: str, session: str) -> None:
    for value in identity(agent, session).values():
        assert value.isascii()
        assert value.isprintable()


@pytest.mark.parametrize(
    ("meta", "headers"),
    [
        ({}, {}),
        ({"baggage": "a=b", "traceparent": "00-1-2-01", "progressToken": 7}, TRACED),
        ({"baggage": 7, "tracestate": ["x"]}, {}),
        ({"baggage": "a=b\r\nx-agent-role: core"}, {}),
    ],
)
def test_mcp_carries_tracing_and_nothing_else(meta: dict[str, Any], headers: dict[str, str]) -> None:
    assert from_mcp(meta) == headers


def test_a_context_of_a2a_is_a_session() -> None:
    assert from_a2a({"contextId": "ctx-1"}) == {"x-session-id": "ctx-1"}
    assert from_a2a({"contextId": 7}, agent="a")["x-agent-name"] == "a"
    assert from_a2a({}) == {}


def test_the_page_is_true(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    exec(code, {})
    assert "ctx-7/triage" in capsys.readouterr().out
    (table,) = blocks("yaml")
    signals = Signals.model_validate(yaml.safe_load(table)["signals"])
    assert signals.sessions == ("x-conversation-id",)
