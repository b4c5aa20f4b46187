"""What became of a request: the frozen record that books, traces and observation are made from."""

from __future__ import annotations

from typing import Any

import msgspec


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one answer, as its engine counted them."""

    prompt: int | None = None
    """Tokens of the prompt, cached ones among them; None where the engine has not said."""
    cached: int = 0
    """Those of the prompt that came out of its prefix cache."""
    completion: int = 0
    """Tokens that it wrote, of all choices."""
    exact: bool = False
    """The engine's own final count. Else: as far as it was heard of when it was cut off."""


NO_USAGE = Usage()


class Spent(msgspec.Struct, frozen=True, gc=False):
    """Tokens of an answer that nobody got: an escalated one, or one that lost to a hedge."""

    variant: str
    """As ``model:variant``."""
    replica: str
    usage: Usage
    why: str
    """``escalated`` or ``hedged``."""


class Record(msgspec.Struct, frozen=True, gc=False):
    """One finished request. Never a prompt or an answer. Seconds are of the gateway's own clock."""

    request_id: str
    path: str
    key: str | None
    """The API key's name."""
    tenant: str | None
    role: str | None
    session: str | None
    parent: str | None
    """The session of the agent that started this one's."""
    model: str
    """As the client named it, if that is a model that exists, else ``other``."""
    variant: str | None
    """As ``model:variant``; of a provider's model ``provider``."""
    replica: str | None
    """Whose answer the client got; of a hedged request, the winner."""
    reason: str | None
    status: int
    """200, or the error's; 499 where the client left. A stream that broke off has 502 or 504."""
    error: str | None
    """For the log: it may say more than the client was told, and never a secret or a prompt."""
    stream: bool
    usage: Usage
    spent: tuple[Spent, ...]
    duration_s: float
    first_token_s: float | None
    """Only of streams."""
    gaps_s: tuple[float, ...]
    """Between the chunks of a stream."""
    overhead_s: float
    """In the gateway itself, without waiting for an engine or a client."""
    hedged: bool
    winner: str | None
    """Of a hedged request: ``first`` or ``second``."""
    escalated: str | None
    """The check that a cheaper variant's answer failed."""
    span: Any = None
    """The OpenTelemetry span, where there is one."""
