"""Whose request it is decides its precision, so each source of a role and its rank is held here."""

from __future__ import annotations

import re
from typing import Any

import pytest
from gateway_stack import make_config
from pydantic import ValidationError

from gateway.config import ApiKey
from gateway.errors import BadRequestError, UnauthenticatedError
from gateway.identity import LONGEST_MODEL, Caller, Identities, Sampler, hash_of, may_use, sent_priority
from gateway.proxy.fields import RequestFields


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


@pytest.mark.parametrize("session", ["anna@example.com", "my password is secret", "säsong", "a\u2028b"])
def test_a_session_that_is_no_plain_identifier_is_known_by_its_hash(session: str) -> None:
    """It may be a person's address, or worse, and it stands in the access log."""
    known = identify({}, {"user": session}).session
    assert known is not None
    assert re.fullmatch("hash:[0-9a-f]{16}", known)
    assert known == identify({}, {"user": session}).session
    assert known != identify({}, {"user": session + "2"}).session


def a_key(**more: Any) -> ApiKey:
    return ApiKey(name="k", sha256="0" * 64, **more)


ADAPTERS = {"legal": {}, "assistant:tone": {}}
PROVIDERS = ({"model": "gpt", "litellm_model": "openai/gpt"},)


@pytest.mark.parametrize(
    ("limits", "may", "may_not"),
    [
        (
            ("assistant",),
            ("assistant", "core", "summarizer", "assistant:int8"),
            ("legal", "assistant:tone", "gpt", "assistant:int2", "assistant:", "nobody"),
        ),
        (("gpt",), ("gpt",), ("assistant", "core", "assistant:bf16", "legal", "assistant:tone")),
        (("legal",), ("legal",), ("assistant", "core", "gpt", "assistant:tone", "legal:bf16")),
        (("assistant:int8",), ("assistant:int8",), ("assistant", "core", "assistant:bf16")),
        (("summarizer",), ("summarizer",), ("assistant", "core", "assistant:int8")),
        ((), ("assistant", "core", "legal", "gpt"), ()),
    ],
)
def test_a_limit_on_models_holds_by_whatever_name(
    limits: tuple[str, ...], may: tuple[str, ...], may_not: tuple[str, ...]
) -> None:
    config = make_config(adapters=ADAPTERS, providers=PROVIDERS)
    key = a_key(models=limits)
    assert [model for model in (*may, *may_not) if may_use(key, model, config)] == list(may)


@pytest.mark.parametrize(
    ("ours", "given", "sent"),
    [
        (0, None, None),
        (0, 0, None),
        (0, 5, 5),
        (0, -5, None),
        (7, None, 7),
        (7, 3, 7),
        (7, "3", 7),
        (7, 9.0, 9),
        (7, "9", 9),
        (-7, None, -7),
        (-7, -9, -7),
        (-7, 0, None),
        (-7, True, 1),
    ],
)
def test_a_client_never_goes_ahead_of_its_place(ours: int, given: Any, sent: int | None) -> None:
    assert sent_priority(Caller("core", None, priority=ours), given) == sent


@pytest.mark.parametrize("given", ["first", 1.5, float("inf"), float("nan"), 10**400, [], {}, "1" * 6000])
def test_a_priority_that_is_none_is_refused(given: Any) -> None:
    with pytest.raises(BadRequestError) as caught:
        sent_priority(Caller("core", None), given)
    assert caught.value.param == "priority"


def test_a_priority_is_the_keys_and_the_roles() -> None:
    roles = {"core": {"priority": -1}, "summarizer": {"priority": 20}, "intent_classifier": {}}
    keys = ({"name": "batch", "sha256": hash_of("sk-batch"), "priority": 50},)
    identities = Identities(make_config(roles=roles, keys=keys))
    sender = identities.sender({"authorization": "Bearer sk-batch"})
    found = {role: sender.caller(RequestFields(model=role)).priority for role in roles}
    assert found == {"core": 49, "summarizer": 70, "intent_classifier": 50}
    without = Identities(make_config(roles=roles)).sender({})
    assert without.caller(RequestFields(model="summarizer")).priority == 20
    with pytest.raises(ValidationError, match="priority"):
        make_config(roles={"core": {"priority": 1000}})


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({"authorization": "Bearer sk-a"}, "a"),
        ({"x-api-key": "sk-b"}, "b"),
        ({"authorization": "Bearer sk-a", "x-api-key": "sk-b"}, "a"),
        ({"authorization": "Bearer eyJ.of.another-service", "x-api-key": "sk-b"}, "b"),
        ({"authorization": "Basic dTpw", "x-api-key": "sk-b"}, "b"),
        ({"authorization": "Bearer sk-a", "x-api-key": "unknown"}, "a"),
        ({"authorization": "Bearer unknown", "x-api-key": "unknown"}, None),
        ({"authorization": "Basic sk-a"}, None),
        ({"authorization": "Bearer "}, None),
        ({}, None),
    ],
)
def test_either_header_may_carry_the_key(headers: dict[str, str], name: str | None) -> None:
    keys = [{"name": one, "sha256": hash_of(f"sk-{one}")} for one in "ab"]
    identities = Identities(make_config(keys=keys))
    if name is None:
        with pytest.raises(UnauthenticatedError):
            identities.key(headers)
        return
    key = identities.key(headers)
    assert key is not None
    assert key.name == name


def test_a_share_is_sampled_and_nobody_chooses() -> None:
    sampler = Sampler(0.25, seed=1)
    drawn = [sampler() for _ in range(20_000)]
    assert 0.23 < sum(drawn) / len(drawn) < 0.27
    assert all(Sampler(1.0)() for _ in range(1000))
    assert not any(Sampler(0.0)() for _ in range(1000))


def test_long_names_of_models_are_not_remembered() -> None:
    """A connection lives long, and what a client calls a model may have megabytes."""
    sender = Identities(make_config()).sender({})
    for name in ("assistant", "x" * (LONGEST_MODEL + 1)):
        sender.caller(RequestFields(model=name))
    assert list(sender._callers) == ["assistant"]
