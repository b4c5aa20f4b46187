"""What coding agents say of themselves decides role and session, and nothing that a key forbids."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gateway_stack import eventually, make_config, running_gateway
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gateway.config.signals import KNOWN_CLIENTS
from gateway.errors import BadRequestError, ForbiddenError
from gateway.identity import Caller, Identities, hash_of
from gateway.proxy.fields import RequestFields
from gateway.signals import SESSION_LIMIT
from gateway.telemetry.logs import LogWriter

ROLES = (
    "core",
    "auxiliary",
    "summarizer",
    "subagent",
    "planner",
    "coder",
    "reviewer",
    "scout",
)
SECRET = "sk-client"
PAGE = (Path(__file__).parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")


def config(**more: Any) -> Any:
    roles = {name: {"agents": ("Explore",) if name == "scout" else ()} for name in ROLES}
    return make_config(**{"roles": roles, "default_role": "core"} | more)


def identify(
    headers: dict[str, str],
    body: dict[str, Any] | None = None,
    key: dict[str, Any] | None = None,
    **more: Any,
) -> Caller:
    if key is not None:
        more["keys"] = [{"name": "k", "sha256": hash_of(SECRET), **key}]
        headers = {"authorization": f"Bearer {SECRET}", **headers}
    asked = RequestFields(**{"model": "assistant", **(body or {})})
    return Identities(config(**more)).sender(headers).caller(asked)


CLAUDE = {"x-claude-code-session-id": "s-1"}
HELPER = {**CLAUDE, "x-claude-code-agent-id": "a-7"}
CODEX = {"session-id": "t-root", "thread-id": "t-root"}
CODEX_CHILD = {"session-id": "t-root", "thread-id": "t-child", "x-codex-parent-thread-id": "t-root"}
OPENCODE = {"x-session-affinity": "ses_1", "x-session-id": "ses_1"}


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        # Claude Code without, and with, its hint headers
        (CLAUDE, {}, ("core", "s-1", None)),
        (HELPER, {}, ("core", "s-1/a-7", "s-1")),
        ({**HELPER, "x-claude-code-parent-agent-id": "a-3"}, {}, ("core", "s-1/a-7", "s-1/a-3")),
        ({**CLAUDE, "x-claude-code-request-class": "main"}, {}, ("coder", "s-1", None)),
        ({**CLAUDE, "x-claude-code-request-class": "auxiliary"}, {}, ("auxiliary", "s-1", None)),
        ({**CLAUDE, "x-claude-code-request-class": "compaction"}, {}, ("summarizer", "s-1", None)),
        ({**HELPER, "x-claude-code-request-class": "workflow"}, {}, ("subagent", "s-1/a-7", "s-1")),
        (
            {**HELPER, "x-claude-code-request-class": "subagent", "x-claude-code-agent-type": "Plan"},
            {},
            ("planner", "s-1/a-7", "s-1"),
        ),
        (
            {**HELPER, "x-claude-code-request-class": "subagent", "x-claude-code-agent-type": "Explore"},
            {},
            ("scout", "s-1/a-7", "s-1"),
        ),
        (
            {**HELPER, "x-claude-code-request-class": "compaction", "x-claude-code-agent-type": "Plan"},
            {},
            ("summarizer", "s-1/a-7", "s-1"),
        ),
        # Codex, of today and older
        (CODEX, {}, ("core", "t-root", None)),
        ({**CODEX_CHILD, "x-openai-subagent": "collab_spawn"}, {}, ("subagent", "t-child", "t-root")),
        ({**CODEX_CHILD, "x-openai-subagent": "review"}, {}, ("reviewer", "t-child", "t-root")),
        ({**CODEX, "x-openai-subagent": "compact"}, {}, ("summarizer", "t-root", None)),
        ({**CODEX, "x-openai-subagent": "memory_consolidation"}, {}, ("auxiliary", "t-root", None)),
        ({**CODEX, "x-openai-memgen-request": "true"}, {}, ("auxiliary", "t-root", None)),
        ({"session_id": "old"}, {"prompt_cache_key": "old"}, ("core", "old", None)),
        ({}, {"prompt_cache_key": "t-9"}, ("core", "t-9", None)),
        # OpenCode, with its parent, and to a provider that is its own
        (OPENCODE, {}, ("core", "ses_1", None)),
        ({**OPENCODE, "x-parent-session-id": "ses_0"}, {}, ("core", "ses_1", "ses_0")),
        ({"x-session-affinity": "ses_1", "x-parent-session-id": "ses_0"}, {}, ("core", "ses_1", "ses_0")),
        ({"x-opencode-session": "ses_1"}, {}, ("core", "ses_1", None)),
        # Kilo Code, Cline by its LiteLLM provider, Qwen Code
        ({"x-kilocode-taskid": "task-4"}, {}, ("core", "task-4", None)),
        ({}, {"litellm_session_id": "cline-01J"}, ("core", "cline-01J", None)),
        ({}, {"metadata": {"sessionId": "q-1", "promptId": "p"}}, ("core", "q-1", None)),
        # Dynamo's convention; a child was once taken for its parent
        ({"x-dynamo-session-id": "d-1"}, {}, ("core", "d-1", None)),
        ({"x-dynamo-session-id": "d-1", "x-dynamo-parent-session-id": "d-0"}, {}, ("core", "d-1", "d-0")),
        ({"x-dynamo-parent-session-id": "d-0"}, {}, ("core", None, None)),
        # programs, of vLLM's extra arguments
        (
            {},
            {"vllm_xargs": {"agentic_context": {"program_id": "p-2", "parent_program_id": "p-1"}}},
            ("core", "p-2", "p-1"),
        ),
        (
            {},
            {"vllm_xargs": {"agentic_context": {"agent_role": "planner", "session_id": "p-2"}}},
            ("planner", "p-2", None),
        ),
        # OpenTelemetry's baggage, which MCP carries in _meta
        (
            {"baggage": "gen_ai.agent.name=planner,gen_ai.conversation.id=c%2F1"},
            {},
            ("planner", "c/1", None),
        ),
        ({"baggage": "session.id=c-2"}, {}, ("core", "c-2", None)),
        # A2A's contextId
        ({}, {"metadata": {"contextId": "ctx-1", "parent_session_id": "up"}}, ("core", "ctx-1", "up")),
        # what is our own comes before what is a client's
        ({**HELPER, "x-session-id": "mine"}, {}, ("core", "mine", None)),
        (
            {"x-agent-name": "planner", "x-claude-code-request-class": "auxiliary"},
            {},
            ("planner", None, None),
        ),
        ({"x-agent-role": "core", "x-openai-subagent": "compact"}, {}, ("core", None, None)),
        ({"x-openai-subagent": "compact"}, {"model": "planner"}, ("planner", None, None)),
        (
            {"x-openai-subagent": "compact"},
            {"metadata": {"agent_role": "planner"}},
            ("summarizer", None, None),
        ),
    ],
)
def test_what_a_client_sends_is_understood(
    headers: dict[str, str], body: dict[str, Any], expected: tuple[str, str | None, str | None]
) -> None:
    caller = identify(headers, body)
    assert (caller.role, caller.session, caller.parent) == expected


def test_a_file_without_such_roles_takes_none_from_them() -> None:
    """Nobody's precision changes because a client begins to say more."""
    plain = {"roles": {"default": {}, "core": {}}, "default_role": "default"}
    for row in KNOWN_CLIENTS:
        if row.value is not None and "core" not in row.roles:
            assert identify({row.header: row.value}, **plain).role == "default"


def test_the_files_own_rows_come_first() -> None:
    signals = {
        "roles": [
            {"header": "X-Claude-Code-Agent-Type", "value": "explore", "role": "summarizer"},
            {"header": "x-claude-code-request-class", "value": "auxiliary"},
            {"header": "x-team", "role": "planner"},
            {"header": "x-my-agent"},
        ],
        "sessions": ["X-Conversation-Id"],
        "parents": ["x-conversation-parent"],
    }
    for headers, role in (
        ({"x-claude-code-agent-type": "EXPLORE"}, "summarizer"),
        ({"x-claude-code-request-class": "auxiliary"}, "core"),
        ({"x-claude-code-request-class": "auxiliary", "x-team": "anything"}, "core"),
        ({"x-team": "anything"}, "planner"),
        ({"x-my-agent": "Explore"}, "scout"),
        ({"x-my-agent": "nobody"}, "core"),
    ):
        assert identify(headers, signals=signals).role == role, headers
    caller = identify({"x-conversation-id": "c-1", "x-conversation-parent": "c-0"}, signals=signals)
    assert (caller.session, caller.parent) == ("c-1", "c-0")
    off = {"known_clients": False}
    assert identify({"x-claude-code-request-class": "auxiliary"}, signals=off).role == "core"


@pytest.mark.parametrize(
    ("signals", "said"),
    [
        (
            {"roles": [{"header": "x-a", "value": "b", "role": "nobody"}]},
            "'nobody' is not a role; known: auxil",
        ),
        ({"roles": [{"header": "x a", "role": "core"}]}, "header"),
        ({"roles": [{"header": "Authorization", "role": "core"}]}, "holds a secret"),
        ({"sessions": ["x-api-key"]}, "holds a secret"),
        (
            {"roles": [{"header": "x-a", "value": "B"}, {"header": "X-A", "value": "b ", "role": "core"}]},
            "listed twice",
        ),
        ({"role": []}, "role"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(signals: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config(signals=signals)


def test_what_a_key_may_not_use_is_passed_over() -> None:
    """The client has not asked for the role in so many words; refusing it would shut the client out."""
    sent = {"x-claude-code-request-class": "auxiliary"}
    assert identify(sent, key={"roles": ["core", "coder"], "default_role": "coder"}).role == "coder"
    assert identify(sent, key={"roles": ["core", "auxiliary"]}).role == "auxiliary"
    assert identify(sent, key={"role": "core"}).role == "core", "bound to the key"
    assert (
        identify({"x-claude-code-request-class": "main"}, key={"roles": ["auxiliary", "core"]}).role == "core"
    )
    with pytest.raises(ForbiddenError, match="may not use core"):
        # A sub-agent that claims to be core still gets nothing beyond its key.
        identify({"x-claude-code-agent-type": "core"}, key={"roles": ["auxiliary"]})
    with pytest.raises(ForbiddenError):
        identify({"x-agent-role": "auxiliary"}, key={"roles": ["core"]})


def test_a_sub_agents_session_is_its_own_in_its_session_alone() -> None:
    one, other = (identify({**HELPER, "x-claude-code-session-id": root}) for root in ("s-1", "s-2"))
    assert one.session != other.session
    long = [identify({**HELPER, "x-claude-code-agent-id": "a" * 200 + end}).session for end in "xy"]
    assert long[0] != long[1], "what is too long is told apart all the same"


HEADERS = sorted(
    {row.header for row in KNOWN_CLIENTS}
    | {
        "x-session-id", "x-parent-session-id", "x-litellm-session-id", "x-dynamo-session-id",
        "x-dynamo-parent-session-id", "x-claude-code-session-id", "x-claude-code-agent-id",
        "x-claude-code-parent-agent-id", "thread-id", "session-id", "session_id", "x-codex-parent-thread-id",
        "x-session-affinity", "x-opencode-session", "x-kilocode-taskid", "x-acme-session-id", "baggage",
        "x-agent-name", "x-agent-role",
    }
)  # fmt: skip
VALUES = st.one_of(
    st.sampled_from([*ROLES, *(row.value for row in KNOWN_CLIENTS if row.value)]),
    st.text(max_size=300),
    st.text("abc,;=%\u00e9\u2028 /", max_size=40).map(lambda text: f"gen_ai.agent.name={text}"),
    st.integers(0, 3).map(lambda n: "x" * 10**n),
)
BODIES = st.dictionaries(
    st.sampled_from(["metadata", "vllm_xargs", "prompt_cache_key", "user", "litellm_session_id"]),
    st.recursive(
        st.one_of(st.none(), st.integers(), st.text(max_size=20)),
        lambda inner: st.dictionaries(
            st.sampled_from(["agentic_context", "session_id", "contextId", "agent_role", "program_id", "x"]),
            inner,
            max_size=3,
        ),
        max_leaves=6,
    ),
    max_size=3,
)
LIMITED = Identities(
    config(
        keys=[
            {
                "name": "k",
                "sha256": hash_of(SECRET),
                "roles": ["core", "reviewer"],
                "default_role": "reviewer",
            }
        ]
    )
)


@given(st.dictionaries(st.sampled_from(HEADERS), VALUES, max_size=6), BODIES)
def test_hostile_values_change_nothing_that_the_key_does_not_allow(
    headers: dict[str, str], body: dict[str, Any]
) -> None:
    sent = {**headers, "authorization": f"Bearer {SECRET}"}
    try:
        caller = LIMITED.sender(sent).caller(RequestFields(model="assistant", **body))
    except (ForbiddenError, BadRequestError):
        # What is asked for in so many words may be refused.
        assert {"x-agent-role", "x-agent-name", "baggage"} & headers.keys() or body
        return
    assert caller.role in ("core", "reviewer")
    for name in (caller.session, caller.parent):
        assert name is None or (len(name) <= SESSION_LIMIT and re.fullmatch(r"[A-Za-z0-9._:/-]+", name))
    assert caller.parent is None or caller.parent != caller.session


@given(st.dictionaries(st.sampled_from(HEADERS), VALUES, max_size=6))
def test_the_same_headers_always_mean_the_same(headers: dict[str, str]) -> None:
    known = Identities(config())
    found = []
    for _ in range(2):
        try:
            found.append(known.sender(headers).caller(RequestFields(model="assistant")))
        except BadRequestError as error:
            found.append(str(error))
    assert found[0] == found[1]


@pytest.fixture
def log() -> Iterator[Any]:
    """The access log's lines, as they are written."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)

    def lines() -> list[dict[str, Any]]:
        with contextlib.suppress(BlockingIOError):
            gathered.extend(os.read(reading, 1 << 20).splitlines())
        return [json.loads(line) for line in gathered]

    gathered: list[bytes] = []
    lines.writer = LogWriter(writing)  # type: ignore[attr-defined]
    yield lines
    lines.writer.close()  # type: ignore[attr-defined]
    os.close(reading)
    os.close(writing)


async def test_over_the_wire_the_class_chooses_the_variant_and_the_log_knows_the_parent(log: Any) -> None:
    roles = {"intent_classifier": {}, "auxiliary": {}, "core": {"budget": {"min_weight_bits": 16}}}
    signals = {
        "roles": [
            {"header": "x-claude-code-request-class", "value": "auxiliary", "role": "intent_classifier"}
        ]
    }
    async with running_gateway(roles=roles, signals=signals) as stack:
        stack.gateway.log.writer = log.writer
        for headers, variant in (
            ({**CLAUDE, "x-claude-code-request-class": "main"}, "assistant:bf16"),
            ({**HELPER, "x-claude-code-request-class": "auxiliary"}, "assistant:int4-kv8"),
        ):
            async with stack.post(headers=headers) as response:
                assert response.status == 200
                assert response.headers["x-tiercel-variant"] == variant
        async with stack.http.post(
            stack.url + "/v1/route", json={"model": "assistant"}, headers=HELPER
        ) as response:
            shown = await response.json()
        assert (shown["session"], shown["parent_session"]) == ("s-1/a-7", "s-1")
        await eventually(lambda: len(log()) == 2)
    first, second = log()
    assert (first["session"], first["parent_session"]) == ("s-1", None)
    assert (second["session"], second["parent_session"]) == ("s-1/a-7", "s-1")


async def test_a_thousand_agent_names_make_no_label() -> None:
    async with running_gateway() as stack:
        for number in range(1000):
            headers = {
                "x-agent-name": f"agent-{number}",
                "x-claude-code-agent-type": f"type-{number}",
                "x-openai-subagent": f"sub-{number}",
                "x-session-id": f"s-{number}",
            }
            async with stack.post(headers=headers) as response:
                assert response.status == 200
        families = [family for family in stack.registry.collect() if family.name == "tiercel_requests"]
        roles = {sample.labels["role"] for family in families for sample in family.samples}
        assert roles == {"core"}
        assert len([sample for family in families for sample in family.samples]) < 10


def test_the_page_names_every_header_that_is_read() -> None:
    for header in {row.header for row in KNOWN_CLIENTS} | set(HEADERS) - {"x-acme-session-id"}:
        assert f"`{header}`" in PAGE, header
    for row in KNOWN_CLIENTS:
        if row.value is not None:
            assert f"`{row.value}`" in PAGE.lower(), row
            assert " → ".join(f"`{role}`" for role in row.roles) in PAGE, row
