"""Who asks: the key, the tenant, the role and the session of a request."""

from __future__ import annotations

import hashlib
import hmac
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gateway.config import ApiKey, Config, parts_of
from gateway.errors import BadRequestError, ForbiddenError, UnauthenticatedError, some_of
from gateway.proxy.fields import RequestFields
from gateway.signals import NO_LINEAGE, Lineage, SignalReader, at, baggage_of, lineage_of
from tiercel_agents.headers import AGENT_HEADER, BAGGAGE_AGENT, ROLE_HEADER

_MOST_PRIORITY = 2**31 - 1
MOST_CALLERS = 16
"""Callers that are remembered with the headers of one connection."""
LONGEST_MODEL = 256
"""Letters of a model's name that is remembered so: whatever a client sends is one, of megabytes too."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The role that a request is made in, the session it belongs to (None when it names none), and whose
    key it came with (None where no keys are asked for)."""

    role: str
    session: str | None
    key: ApiKey | None = None
    cache_salt: str = field(default="", repr=False)
    """Given to engines, so that the time a prefix takes tells one owner nothing of another's."""
    priority: int = 0
    """vLLM's: the key's and the role's; higher comes later."""
    parent: str | None = None
    """The session of the agent that started this one."""

    @property
    def tenant(self) -> str:
        return self.key.tenant if self.key else ""


def owner_of(key: ApiKey | None) -> str:
    """Whose something is: all keys' of one tenant. A key without a tenant is a tenant of its own: neither
    what it kept nor the room that it takes is another key's, nor what is cached of its prompts. Empty where
    no keys are asked for."""
    if key is None:
        return ""
    return f"tenant:{key.tenant}" if key.tenant else f"key:{key.name}"


class Identities:
    """Knows keys and roles."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._keys = {key.sha256: key for key in config.keys}
        self._salts = {
            owner_of(key): hashlib.sha256(f"tiercel:{owner_of(key)}:{key.sha256}".encode()).hexdigest()[:32]
            for key in reversed(config.keys)
        }
        self._agents = {agent: name for name, role in config.roles.items() for agent in role.agents}
        self._agents |= {name: name for name in config.roles}
        self.signals = SignalReader(config, self.role_of)

    def sender(self, headers: Mapping[str, str]) -> Sender:
        """What the headers of a request say of who makes it; their names are in lower case.
        Raises UnauthenticatedError."""
        return Sender(self, headers, self.key(headers))

    def role_of(self, agent: Any) -> str | None:
        """The role that an agent's name stands for."""
        return self._agents.get(agent.strip()) if isinstance(agent, str) else None

    def salt(self, key: ApiKey | None) -> str:
        """Of its owner, see :func:`owner_of`; empty where no keys are asked for."""
        return self._salts[owner_of(key)] if key else ""

    def key(self, headers: Mapping[str, str]) -> ApiKey | None:
        """The key of a request; None where no keys are asked for. Raises UnauthenticatedError."""
        if not self._keys:
            return None
        given = headers.get("authorization", "")
        bearer = given[7:].strip() if given[:7].lower() == "bearer " else ""
        other = headers.get("x-api-key", "").strip()
        # Clients that were made for another service send its token beside our key.
        key = self._known(bearer) or self._known(other)
        if key is None and (bearer or other):
            raise UnauthenticatedError("authorization: this key is not known; ask for one")
        if key is None:
            raise UnauthenticatedError(
                "authorization: no key was sent; send the header `authorization: Bearer KEY`"
            )
        return key

    def _known(self, secret: str) -> ApiKey | None:
        if not secret:
            return None
        digest = hash_of(secret)
        # Looked up by its hash: how long that takes tells nothing about any key.
        key = self._keys.get(digest)
        return key if key is not None and hmac.compare_digest(key.sha256, digest) else None


class Sender:
    """What the headers of a request say of who makes it: the same for all requests with the same headers."""

    __slots__ = (
        "_agent",
        "_callers",
        "_config",
        "_given",
        "_key",
        "_lineage",
        "_meant",
        "_salt",
        "identities",
    )

    def __init__(self, identities: Identities, headers: Mapping[str, str], key: ApiKey | None) -> None:
        self.identities = identities
        self._config = identities.config
        self._key = key
        self._salt = identities.salt(key)
        self._given = headers.get(ROLE_HEADER, "").strip()
        self._agent = identities.role_of(headers.get(AGENT_HEADER))
        self._meant: tuple[str, ...] = ()
        self._lineage = NO_LINEAGE
        if not identities.signals.silent(headers):
            baggage = baggage_of(headers)
            if self._agent is None and baggage:
                self._agent = identities.role_of(baggage.get(BAGGAGE_AGENT))
            self._meant = identities.signals.roles(headers)
            self._lineage = identities.signals.lineage(headers, baggage)
        self._callers: dict[str, Caller] = {}

    @property
    def owner(self) -> str:
        """Whose it is, see :func:`owner_of`."""
        return owner_of(self._key)

    def caller(self, asked: RequestFields) -> Caller:
        """Who makes a request with this body.

        Raises ForbiddenError, and BadRequestError for an ``x-agent-role`` that is no role: whoever sends
        that header means one, and serving a typo at the default precision would go unnoticed for weeks.
        """
        if (
            asked.metadata is None
            and asked.vllm_xargs is None
            and asked.prompt_cache_key is None
            and asked.user is None
            and asked.litellm_session_id is None
        ):  # nearly always: nothing but the model can differ from the sender's last request
            known = self._callers.get(asked.model)
            if known is None:
                known = self._caller(asked, self._lineage)
                if len(self._callers) < MOST_CALLERS and len(asked.model) <= LONGEST_MODEL:
                    self._callers[asked.model] = known
            return known
        said = lineage_of(asked)
        own = self._lineage
        return self._caller(asked, Lineage(own.session or said.session, own.parent or said.parent))

    def _caller(self, asked: RequestFields, lineage: Lineage) -> Caller:
        role = self._role(asked)
        if self._key is not None:
            # Who names none is served as its role; so is who names another role than its key's.
            named = role if not asked.model or asked.model in self._config.roles else asked.model
            _check(self._key, role, named, self._config)
        priority = self._config.roles[role].priority
        if self._key is not None:
            priority += self._key.priority
        return Caller(role, lineage.session, self._key, self._salt, priority, lineage.parent)

    def _role(self, asked: RequestFields) -> str:
        """The first source that names a role wins; the order is the architecture's."""
        key, roles = self._key, self._config.roles
        if key is not None and key.role is not None:
            return key.role
        if asked.model in roles:
            return asked.model
        if self._given:
            if self._given not in roles:
                known = some_of(sorted(roles))
                raise BadRequestError(
                    f"x-agent-role: {self._given[:80]!r} is not a role; use one of: {known}",
                    param="x-agent-role",
                    internal="x-agent-role: is not a role",
                )
            return self._given
        if self._agent is not None:
            return self._agent
        for role in self._meant:
            if self._allows(role, asked):
                return role
        if asked.metadata is not None or asked.vllm_xargs is not None:
            role_of = self.identities.role_of
            if said := role_of(at(asked.metadata, "agent_role")):
                return said
            if said := role_of(at(asked.vllm_xargs, "agentic_context", "agent_role")):
                return said
        if key is not None and key.default_role is not None:
            return key.default_role
        return self._config.default_role

    def _allows(self, role: str, asked: RequestFields) -> bool:
        """Whether the key may use a role that a client has not asked for in so many words: what it may not is
        passed over, where asking for it would be refused."""
        key = self._key
        if key is None:
            return True
        if key.roles and role not in key.roles:
            return False
        return bool(asked.model) or may_use(key, role, self._config)


def hash_of(secret: str) -> str:
    """What is kept of a key: its SHA-256 in hex. Keys are random and long, so no salt is needed."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def may_use(key: ApiKey, model: str, config: Config) -> bool:
    """Whether a key may name a model. It may if the name is listed, or if a model is listed that it stands
    for: that of a ``model:variant``, or one that may serve a role. Adapters, and models of providers, stand
    for themselves alone."""
    if not key.models or model in key.models:
        return True
    if model in config.roles:
        return not set(config.models_of(model)).isdisjoint(key.models)
    return model in config.served and parts_of(model)[0] in key.models


def _check(key: ApiKey, role: str, model: str, config: Config) -> None:
    if key.roles and role not in key.roles:
        raise ForbiddenError(
            f"role: this key may not use {role}; it may use: {some_of(key.roles)}", param="model"
        )
    if not may_use(key, model, config):
        raise ForbiddenError(
            f"model: this key may not use {model[:80]!r}; it may use: {some_of(key.models)}",
            param="model",
            internal=f"model: the key {key.name} may not use it",
        )


def sent_priority(caller: Caller, given: Any) -> int | None:
    """The ``priority`` that an engine is sent; None for none, which is vLLM's 0. A client may put its request
    behind others of its own; it never goes ahead of where its key and role are. ``given`` is what it sent, as
    vLLM would read it. Raises BadRequestError."""
    ours = caller.priority
    if given is not None:
        try:
            wanted = int(given) if not isinstance(given, float) or given.is_integer() else None
        except (ValueError, TypeError, OverflowError):
            wanted = None
        if wanted is None or not -_MOST_PRIORITY <= wanted <= _MOST_PRIORITY:
            raise BadRequestError(
                "priority: is no whole number; send one, higher comes later", param="priority"
            )
        ours = max(ours, wanted)
    return ours or None


class Sampler:
    """Draws the share of requests that are looked at more closely. Nothing that a client sends has a part in
    it: whoever could choose would be looked at always, or never."""

    def __init__(self, share: float, seed: int | None = None) -> None:
        self.share = share
        self._draw = random.Random(seed).random

    def __call__(self) -> bool:
        """Whether the present request is one of them."""
        return self._draw() < self.share
