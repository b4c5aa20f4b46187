"""Who asks: the key, the tenant, the role and the session of a request."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import unquote

from gateway.config import Config, Key
from gateway.errors import BadRequestError, ForbiddenError, UnauthenticatedError

_NAMED_SESSIONS = ("x-session-id", "x-litellm-session-id", "x-claude-code-session-id")
_SESSION_LIMIT = 128


class Fields(Protocol):
    """A request's body: a field's value, or None."""

    def get(self, field: str) -> Any: ...


@dataclass(frozen=True, slots=True)
class Caller:
    """The role that a request is made in, the session it belongs to (None when it names none), and whose
    key it came with (None where no keys are asked for)."""

    role: str
    session: str | None
    key: Key | None = None
    cache_salt: str = ""
    """Given to engines, so that the time a prefix takes tells one tenant nothing of another's."""

    @property
    def tenant(self) -> str:
        return self.key.tenant if self.key else ""


class Identities:
    """Knows keys and roles."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._keys = {key.sha256: key for key in config.keys}
        self._salts = {
            key.tenant: hashlib.sha256(f"tiercel:{key.tenant}:{key.sha256}".encode()).hexdigest()[:32]
            for key in reversed(config.keys)
            if key.tenant
        }
        self._agents = {agent: name for name, role in config.roles.items() for agent in role.agents}
        self._agents |= {name: name for name in config.roles}

    def of(self, headers: Mapping[str, str], body: Fields, key: Key | None) -> Caller:
        """Who makes a request. ``headers`` have lower-case names.

        Raises ForbiddenError, and BadRequestError for an ``x-agent-role`` that is no
        role: whoever sends that header means one, and serving a typo at the default precision would go
        unnoticed for weeks.
        """
        role = self._role(headers, body, key)
        model = body.get("model")
        if key is not None:
            _check(key, role, model, self._config)
        salt = self._salts.get(key.tenant, "") if key else ""
        return Caller(role, _session(headers, body), key, salt)

    def key(self, headers: Mapping[str, str]) -> Key | None:
        """The key of a request; None where no keys are asked for. Raises UnauthenticatedError."""
        if not self._keys:
            return None
        given = headers.get("authorization", "")
        bearer = given[:7].lower() == "bearer "
        secret = given[7:].strip() if bearer else headers.get("x-api-key", "").strip()
        if not secret:
            raise UnauthenticatedError(
                "authorization: no key was sent; send the header `authorization: Bearer KEY`"
            )
        digest = hash_of(secret)
        # Looked up by its hash: how long that takes tells nothing about any key.
        key = self._keys.get(digest)
        if key is None or not hmac.compare_digest(key.sha256, digest):
            raise UnauthenticatedError("authorization: this key is not known; ask for one")
        return key

    def _role(self, headers: Mapping[str, str], body: Fields, key: Key | None) -> str:
        """The first source that names a role wins; the order is the architecture's."""
        if key is not None and key.role is not None:
            return key.role
        roles, agents = self._config.roles, self._agents
        model = body.get("model")
        if isinstance(model, str) and model in roles:
            return model
        if (given := headers.get("x-agent-role")) is not None and (role := given.strip()):
            if role not in roles:
                known = ", ".join(sorted(roles))
                raise BadRequestError(
                    f"x-agent-role: {role[:80]!r} is not a role; use one of: {known}", param="x-agent-role"
                )
            return role
        if (agent := headers.get("x-agent-name")) and (named := agents.get(agent.strip())):
            return named
        if baggage := headers.get("baggage"):
            agent = _baggage(baggage).get("gen_ai.agent.name", "")
            if named := agents.get(agent.strip()):
                return named
        for path in (("metadata", "agent_role"), ("vllm_xargs", "agentic_context", "agent_role")):
            agent = _at(body, *path)
            if isinstance(agent, str) and (named := agents.get(agent.strip())):
                return named
        if key is not None and key.default_role is not None:
            return key.default_role
        return self._config.default_role


def hash_of(secret: str) -> str:
    """What is kept of a key: its SHA-256 in hex. Keys are random and long, so no salt is needed."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _check(key: Key, role: str, model: Any, config: Config) -> None:
    if key.roles and role not in key.roles:
        raise ForbiddenError(
            f"role: this key may not use {role}; it may use: {', '.join(key.roles)}", param="model"
        )
    if not key.models or not isinstance(model, str) or model in config.roles:
        return
    if model not in key.models and model.partition(":")[0] not in key.models:
        raise ForbiddenError(
            f"model: this key may not use {model[:80]!r}; it may use: {', '.join(key.models)}", param="model"
        )


def _session(headers: Mapping[str, str], body: Fields) -> str | None:
    for name in _NAMED_SESSIONS:
        if (given := headers.get(name)) and given.strip():
            return given.strip()[:_SESSION_LIMIT]
    vendors = [name for name in headers if name.endswith("-session-id") and name.startswith("x-")]
    for name in sorted(vendors):
        if given := headers[name].strip():
            return given[:_SESSION_LIMIT]
    for session in (_at(body, "metadata", "session_id"), body.get("prompt_cache_key"), body.get("user")):
        if isinstance(session, str) and session.strip():
            return session.strip()[:_SESSION_LIMIT]
    return None


def _baggage(header: str) -> dict[str, str]:
    """W3C Baggage: ``key=value;property,key=value``, values percent-encoded."""
    pairs = (member.split(";", 1)[0].partition("=") for member in header.split(","))
    return {key.strip(): unquote(value.strip()) for key, equals, value in pairs if equals}


def _at(body: Any, *path: str) -> Any:
    here: Any = body
    for key in path:
        here = here.get(key) if hasattr(here, "get") else None
        if here is None:
            return None
    return here
