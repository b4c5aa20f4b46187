"""Who asks: the role and the session of a request. (No API keys yet: everybody is one tenant.)"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from gateway.config import Config
from gateway.errors import BadRequestError

_VENDOR_SESSION = re.compile(r"x-[a-z0-9-]+-session-id")
_NAMED_SESSIONS = ("x-session-id", "x-litellm-session-id", "x-claude-code-session-id")
_SESSION_LIMIT = 128


@dataclass(frozen=True)
class Caller:
    """The role that a request is made in, and the session it belongs to (None when it names none)."""

    role: str
    session: str | None


def identify(config: Config, headers: Mapping[str, str], body: Mapping[str, Any]) -> Caller:
    """Role and session of a request. ``headers`` have lower-case names.

    Raises BadRequestError for an ``x-agent-role`` that is no role: whoever sends that header means a role,
    and serving a typo at the default precision would go unnoticed for weeks.
    """
    return Caller(role=_role(config, headers, body), session=_session(headers, body))


def _role(config: Config, headers: Mapping[str, str], body: Mapping[str, Any]) -> str:
    """The first source that names a role wins; the order is DESIGN.md's."""
    model = body.get("model")
    if isinstance(model, str) and model in config.roles:
        return model
    if role := headers.get("x-agent-role", "").strip():
        if role not in config.roles:
            known = ", ".join(sorted(config.roles))
            raise BadRequestError(
                f"x-agent-role: {role[:80]!r} is not a role; use one of: {known}", param="x-agent-role"
            )
        return role
    agents = (
        headers.get("x-agent-name"),
        _baggage(headers.get("baggage", "")).get("gen_ai.agent.name"),
        _at(body, "metadata", "agent_role"),
        _at(body, "vllm_xargs", "agentic_context", "agent_role"),
    )
    for agent in agents:
        if isinstance(agent, str) and (known_role := config.role_of_agent(agent.strip())):
            return known_role
    return config.default_role


def _session(headers: Mapping[str, str], body: Mapping[str, Any]) -> str | None:
    named = [headers.get(name) for name in _NAMED_SESSIONS]
    vendors = [value for name, value in sorted(headers.items()) if _VENDOR_SESSION.fullmatch(name)]
    in_body = [_at(body, "metadata", "session_id"), body.get("prompt_cache_key"), body.get("user")]
    for session in (*named, *vendors, *in_body):
        if isinstance(session, str) and session.strip():
            return session.strip()[:_SESSION_LIMIT]
    return None


def _baggage(header: str) -> dict[str, str]:
    """W3C Baggage: ``key=value;property,key=value``, values percent-encoded."""
    pairs = (member.split(";", 1)[0].partition("=") for member in header.split(","))
    return {key.strip(): unquote(value.strip()) for key, equals, value in pairs if equals}


def _at(body: Mapping[str, Any], *path: str) -> Any:
    here: Any = body
    for key in path:
        here = here.get(key) if isinstance(here, Mapping) else None
    return here
