"""The HTTP headers in which an agent says who it is: read by the gateway, sent by what is in this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

AGENT_HEADER = "x-agent-name"
"""The agent's own name; the gateway's configuration says which role that is."""
ROLE_HEADER = "x-agent-role"
"""A role by its own name. One that the gateway does not have is an error."""
SESSION_HEADER = "x-session-id"
"""Keeps a conversation where its prefix is in the cache."""
PARENT_HEADER = "x-parent-session-id"
"""The session of the agent that started this one."""
INVOCATION_HEADER = "x-invocation-id"
"""Joins logs and traces; the gateway passes over it."""
BAGGAGE_HEADER = "baggage"
"""W3C Baggage."""
BAGGAGE_AGENT = "gen_ai.agent.name"
"""OpenTelemetry's name of the agent's name, as a key of baggage."""
BAGGAGE_SESSION = "gen_ai.conversation.id"
"""OpenTelemetry's name of the session's, likewise."""

VARIANT_HEADER = "x-tiercel-variant"
"""Of an answer: ``model:variant`` that gave it."""
REPLICA_HEADER = "x-tiercel-replica"
REASON_HEADER = "x-tiercel-route-reason"
REQUEST_HEADER = "x-request-id"

_CARRIED = ("traceparent", "tracestate", BAGGAGE_HEADER)
_SAFE = "!#$&'()*+,/:;=?@[]^`{|}~ "


def identity(
    agent: str = "", session: str = "", parent: str = "", role: str = "", invocation: str = ""
) -> dict[str, str]:
    """The headers that say so; what is empty is left out. What no header can carry is percent-encoded.

    They go into whatever a client takes as default or extra headers.
    """
    known = {
        AGENT_HEADER: _text(agent),
        ROLE_HEADER: _text(role),
        SESSION_HEADER: _text(session),
        PARENT_HEADER: _text(parent),
        INVOCATION_HEADER: _text(invocation),
        BAGGAGE_HEADER: agent and f"{BAGGAGE_AGENT}={quote(agent, safe='', errors='replace')}",
    }
    return {name: value for name, value in known.items() if value}


def from_mcp(meta: Mapping[str, Any]) -> dict[str, str]:
    """What ``_meta`` of an MCP request carries, as headers of the model's request that is made for it."""
    found = ((name, meta.get(name)) for name in _CARRIED)
    return {name: value for name, value in found if isinstance(value, str) and _is_header(value)}


def from_a2a(message: Mapping[str, Any], agent: str = "") -> dict[str, str]:
    """The session of an agent that was sent this A2A message: its context."""
    context = message.get("contextId")
    return identity(agent, context if isinstance(context, str) else "")


def _text(value: str) -> str:
    """Printable ASCII as it is, the rest percent-encoded."""
    return quote(value, safe=_SAFE, errors="replace").strip()


def _is_header(value: str) -> bool:
    return value.isascii() and value.isprintable()
