"""What a client's own headers say of a request: roles that it may mean, its session, and whose child that is.

They are read once per request head, which clients repeat from request to request. A sub-agent has a session
of its own and knows its parent's. Whatever is said is a name, and nothing more: an operator's table says
which role that is, and the key whether it may be used (``identity.py``).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

from gateway.config import Config
from gateway.config.signals import KNOWN_CLIENTS, Known
from gateway.proxy.fields import RequestFields
from tiercel_agents.headers import (
    BAGGAGE_HEADER,
    BAGGAGE_SESSION,
    PARENT_HEADER,
    SESSION_HEADER,
)

SESSION_LIMIT = 128
"""Letters of a session's name that count."""
_LONGEST_VALUE = 256
"""Of a header that may mean a role."""
_PLAIN_SESSION = re.compile(r"[A-Za-z0-9._:/-]+")

_CLAUDE_SESSION, _CLAUDE_AGENT = "x-claude-code-session-id", "x-claude-code-agent-id"
_CLAUDE_PARENT = "x-claude-code-parent-agent-id"
_CODEX_THREAD, _CODEX_PARENT = "thread-id", "x-codex-parent-thread-id"
_PARENT_OF = {
    SESSION_HEADER: PARENT_HEADER,
    "x-dynamo-session-id": "x-dynamo-parent-session-id",
    _CODEX_THREAD: _CODEX_PARENT,
    "session-id": _CODEX_PARENT,
    "session_id": _CODEX_PARENT,
}
"""A session's header to that of its parent, by the same client."""
_OPENS = "x-amzn-sagemaker-session-id"
"""Names a session that an engine keeps, which whoever knows the name may use."""
_LATER = ("session-id", "session_id", "x-session-affinity", "x-opencode-session", "x-kilocode-taskid")


class Lineage(NamedTuple):
    """A session, and the one that started it."""

    session: str | None
    parent: str | None


NO_LINEAGE = Lineage(None, None)


class SignalReader:
    """Reads headers by the table of a configuration."""

    def __init__(self, config: Config, role_of: Callable[[Any], str | None]) -> None:
        own = config.signals
        self._role_of = role_of
        rows = [
            Known(row.header, _value(row.value), () if row.role is None else (row.role,)) for row in own.roles
        ]
        if own.known_clients:
            # A row that means a role which the file does not have means nothing, and later ones may.
            for row in KNOWN_CLIENTS:
                roles = tuple(role for role in row.roles if role in config.roles)[:1]
                if roles or not row.roles:
                    rows.append(row._replace(roles=roles))
        self._rows = tuple(rows)
        self._headers = frozenset(row.header for row in rows)
        self._first = (SESSION_HEADER, *own.sessions, "x-litellm-session-id", "x-dynamo-session-id")
        self._parents = (*own.parents, PARENT_HEADER)
        self._read = self._headers | {
            *self._first,
            *self._parents,
            *_PARENT_OF,
            *_PARENT_OF.values(),
            *_LATER,
        }
        self._read |= {_CLAUDE_SESSION, _CLAUDE_AGENT, _CLAUDE_PARENT, BAGGAGE_HEADER}

    def silent(self, headers: Mapping[str, str]) -> bool:
        """Whether nothing in the headers can say anything, as with most requests."""
        return self._read.isdisjoint(headers) and not _vendors(headers)

    def roles(self, headers: Mapping[str, str]) -> tuple[str, ...]:
        """The roles that are meant, the first one most. Header names are in lower case."""
        if self._headers.isdisjoint(headers):
            return ()
        found: dict[str, None] = {}
        for row in self._rows:
            raw = headers.get(row.header)
            if raw is None or len(raw) > _LONGEST_VALUE:
                continue
            if row.value is not None and row.value != _value(raw):
                continue
            if row.roles:
                found[row.roles[0]] = None
            elif row.value is not None:
                break
            elif role := self._role_of(raw):
                found[role] = None
        return tuple(found)

    def lineage(self, headers: Mapping[str, str], baggage: Mapping[str, str]) -> Lineage:
        """The session by the headers, and its parent."""
        session, parent = self._session(headers)
        if session is not None and session == _text(headers, _OPENS):
            session = _hashed(session)
        if session is None:
            session = baggage.get(BAGGAGE_SESSION) or baggage.get("session.id") or None
        if parent is None:
            parent = next(filter(None, (_text(headers, name) for name in self._parents)), None)
        if session is None and parent is None:
            return NO_LINEAGE
        return _lineage(session, parent)

    def _session(self, headers: Mapping[str, str]) -> tuple[str | None, str | None]:
        """As they were sent; the first convention that names a session says both."""
        for name in self._first:
            if session := _text(headers, name):
                return session, _text(headers, _PARENT_OF.get(name, ""))
        root = _text(headers, _CLAUDE_SESSION)
        if agent := _text(headers, _CLAUDE_AGENT):
            # An agent's id is its own within its session alone.
            parent = _text(headers, _CLAUDE_PARENT)
            return _within(root, agent), root if parent is None else _within(root, parent)
        if root:
            return root, None
        for name in (_CODEX_THREAD, *_LATER):
            if session := _text(headers, name):
                return session, _text(headers, _PARENT_OF.get(name, ""))
        for name in sorted(_vendors(headers)):
            if "-parent-" not in name and (session := _text(headers, name)):
                return session, None
        return None, None


def lineage_of(asked: RequestFields) -> Lineage:
    """The session by a request's body, and its parent."""
    metadata, context = asked.metadata, at(asked.vllm_xargs, "agentic_context")
    sessions = (
        at(metadata, "session_id"),
        at(metadata, "sessionId"),
        at(metadata, "contextId"),
        at(context, "session_id"),
        at(context, "program_id"),
        asked.litellm_session_id,
        asked.prompt_cache_key,
        asked.user,
    )
    parents = (
        at(metadata, "parent_session_id"),
        at(context, "parent_session_id"),
        at(context, "parent_program_id"),
    )
    return _lineage(_first_text(sessions), _first_text(parents))


def pairs_of(baggage: str) -> dict[str, str]:
    """W3C Baggage: ``key=value;property,key=value``, values percent-encoded."""
    pairs = (member.split(";", 1)[0].partition("=") for member in baggage.split(","))
    return {key.strip(): unquote(value.strip()) for key, equals, value in pairs if equals}


def at(value: Any, *path: str) -> Any:
    """What stands in a body there; None where nothing does."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def baggage_of(headers: Mapping[str, str]) -> Mapping[str, str]:
    """The request's baggage; empty where it has none."""
    sent = headers.get(BAGGAGE_HEADER)
    return pairs_of(sent) if sent else {}


def _vendors(headers: Mapping[str, str]) -> list[str]:
    return [name for name in headers if name.endswith("-session-id") and name.startswith("x-")]


def _lineage(session: str | None, parent: str | None) -> Lineage:
    own = None if session is None else _named(session)
    above = None if parent is None else _named(parent)
    return Lineage(own, None if above == own else above)


def _within(root: str | None, agent: str) -> str:
    """An agent's session. What is too long is told apart by its hash, not by its beginning."""
    name = agent if root is None else f"{root}/{agent}"
    return name if len(name) <= SESSION_LIMIT else f"{_hashed(name)}/agent"


def _named(session: str) -> str:
    """A session's name as it is used and logged: what is no plain identifier (a person's address, a sentence)
    only by its hash."""
    session = session[:SESSION_LIMIT]
    return session if _PLAIN_SESSION.fullmatch(session) else _hashed(session)


def _hashed(text: str) -> str:
    return "hash:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _text(headers: Mapping[str, str], name: str) -> str | None:
    return headers.get(name, "").strip() or None


def _first_text(values: tuple[Any, ...]) -> str | None:
    return next((value.strip() for value in values if isinstance(value, str) and value.strip()), None)


def _value(value: str | None) -> str | None:
    return None if value is None else value.strip().lower()
