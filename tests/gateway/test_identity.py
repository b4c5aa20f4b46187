"""Whose request it is decides its precision, so each source of a role and its rank is held here."""

from __future__ import annotations

from typing import Any

import pytest
from gateway_stack import make_config

from gateway.errors import BadRequestError
from gateway.identity import Caller, Identities
from gateway.proxy.body import RequestFields


def identify(headers: dict[str, str], body: dict[str, Any]) -> Caller:
    return Identities(make_config()).sender(headers).caller(RequestFields(**{"model": "assistant", **body}))


@pytest.mark.parametrize(
    ("headers", "body", "role"),
    [
        ({}, {"model": "assistant"}, "core"),
        ({}, {"model": "summarizer"}, "summarizer"),
        ({"x-agent-role": "intent_classifier"}, {"model": "summarizer"}, "summarizer"),
        ({"x-agent-role": " summarizer "}, {}, "summarizer"),
        ({"x-agent-role": "summarizer", "x-agent-name": "IntentAgent"}, {}, "summarizer"),
        ({"x-agent-name": "IntentAgent"}, {}, "intent_classifier"),
        ({"x-agent-name": "summarizer"}, {}, "summarizer"),
        ({"x-agent-name": "nobody"}, {}, "core"),
        ({"x-agent-name": "nobody"}, {"metadata": {"agent_role": "summarizer"}}, "summarizer"),
        ({"baggage": "a=b,gen_ai.agent.name=IntentAgent;p=1"}, {}, "intent_classifier"),
        ({"baggage": "gen_ai.agent.name=Intent%41gent"}, {}, "intent_classifier"),
        (
            {"x-agent-name": "IntentAgent", "baggage": "gen_ai.agent.name=summarizer"},
            {},
            "intent_classifier",
        ),
        (
            {"baggage": "gen_ai.agent.name=summarizer"},
            {"metadata": {"agent_role": "core"}},
            "summarizer",
        ),
        ({}, {"metadata": {"agent_role": "summarizer"}}, "summarizer"),
        ({}, {"metadata": {"agent_role": 7}}, "core"),
        ({}, {"metadata": "text"}, "core"),
        ({}, {"vllm_xargs": {"agentic_context": {"agent_role": "summarizer"}}}, "summarizer"),
    ],
)
def test_first_source_that_names_a_role_wins(
    headers: dict[str, str], body: dict[str, object], role: str
) -> None:
    assert identify(headers, body).role == role


def test_unknown_role_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadRequestError, match="core, intent_classifier, summarizer") as caught:
        identify({"x-agent-role": "sumarizer"}, {})
    assert caught.value.param == "x-agent-role"


@pytest.mark.parametrize(
    ("headers", "body", "session"),
    [
        ({}, {}, None),
        ({"x-session-id": "a", "x-litellm-session-id": "b"}, {"user": "c"}, "a"),
        ({"x-litellm-session-id": "b", "x-acme-session-id": "d"}, {}, "b"),
        ({"x-claude-code-session-id": "e", "x-acme-session-id": "d"}, {}, "e"),
        ({"x-acme-session-id": "d"}, {"user": "c"}, "d"),
        ({}, {"metadata": {"session_id": "f"}, "prompt_cache_key": "g"}, "f"),
        ({}, {"prompt_cache_key": "g", "user": "c"}, "g"),
        ({}, {"user": "c"}, "c"),
        ({"x-session-id": "s" * 500}, {}, "s" * 128),
    ],
)
def test_session(headers: dict[str, str], body: dict[str, object], session: str | None) -> None:
    assert identify(headers, body).session == session
