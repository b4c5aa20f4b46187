"""What clients say of their agents by themselves: which of it names a role, a session, or a session's parent.

The rows of known clients are here too, so that the whole table is in one place; what each client sends, and
where that is documented, is in docs/clients.md.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from gateway.config.section import Section

_SECRET = ("authorization", "cookie", "proxy-authorization", "x-api-key", "x-goog-api-key")


def _header(name: str) -> str:
    if name in _SECRET:
        raise ValueError(f"{name!r} holds a secret, which must not become a name; give another header")
    return name


HeaderName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}$"),
    AfterValidator(str.lower),
    AfterValidator(_header),
]


class Signal(Section):
    """A row: a header, its value, and the role that is meant by it."""

    header: HeaderName
    value: str | None = Field(
        default=None, max_length=256, description="upper and lower case are the same; none: any value"
    )
    role: str | None = Field(
        default=None,
        description="what it means; none: with a value that it means no role, without one that the header "
        "has an agent's name, of those that roles list",
    )


class Signals(Section):
    """Rows are asked in their order, and before those of known clients; the first that names a role which the
    key may use decides. What a client names by x-agent-role, x-agent-name or baggage comes before all."""

    known_clients: bool = Field(default=True, description="take roles from what known coding agents send")
    roles: tuple[Signal, ...] = ()
    sessions: tuple[HeaderName, ...] = Field(
        default=(), description="more headers with a session's id, asked after x-session-id"
    )
    parents: tuple[HeaderName, ...] = Field(
        default=(), description="more headers with the id of the session that started this one"
    )

    @model_validator(mode="after")
    def _rows_differ(self) -> Signals:
        seen = set()
        for row in self.roles:
            what = (row.header, None if row.value is None else row.value.strip().lower())
            if what in seen:
                raise ValueError(f"roles: {row.header} with {row.value!r} is listed twice; list it once")
            seen.add(what)
        return self


class Known(NamedTuple):
    """A row of a known client. ``roles``: the first of them that the file has is meant; none: the value is an
    agent's name."""

    header: str
    value: str | None
    roles: tuple[str, ...] = ()


_CLASS, _TYPE = "x-claude-code-request-class", "x-claude-code-agent-type"
_SUBAGENT = "x-openai-subagent"
_HELPER = ("subagent", "coder")

KNOWN_CLIENTS: tuple[Known, ...] = (
    Known(_CLASS, "compaction", ("compactor", "summarizer")),
    Known(_CLASS, "auxiliary", ("auxiliary",)),
    Known(_TYPE, None),
    Known(_TYPE, "plan", ("planner", *_HELPER)),
    Known(_TYPE, "explore", ("explorer", *_HELPER)),
    Known(_CLASS, "workflow", ("workflow", *_HELPER)),
    Known(_CLASS, "subagent", _HELPER),
    Known(_CLASS, "main", ("coder", "core")),
    Known(_SUBAGENT, None),
    Known(_SUBAGENT, "compact", ("compactor", "summarizer")),
    Known(_SUBAGENT, "memory_consolidation", ("auxiliary", "summarizer")),
    Known(_SUBAGENT, "review", ("reviewer", *_HELPER)),
    Known(_SUBAGENT, "collab_spawn", _HELPER),
    Known("x-openai-memgen-request", "true", ("auxiliary", "summarizer")),
)
"""Sub-agents write code, and what they find decides; so they are never taken for a role that is called
auxiliary, unless the file says so."""
