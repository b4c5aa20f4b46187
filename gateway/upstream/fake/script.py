"""How a fake engine behaves."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Call:
    """One use of a tool; ``arguments`` are JSON, or what a model takes for it."""

    name: str
    arguments: str = "{}"


@dataclass
class Script:
    """Change it at any time; a request has what is there when it comes."""

    text: str = "The total is $277."
    replies: list[str] = field(default_factory=list)
    """What it says instead, one after the other, as long as there are any."""
    calls: tuple[Call, ...] = ()
    """Tools that it uses instead of saying anything, all in one answer."""
    first_token_delay_s: float = 0.0
    hold: asyncio.Event | None = None
    """Wait for it as well before the first token."""
    token_delay_s: float = 0.0
    status: int = 200
    """Any other status is answered with vLLM's error body."""
    message: str = "scripted failure"
    die_after: int | None = None
    """Cut the connection after so many tokens; 0 is before the first."""
    error_after: int | None = None
    """Send an error event after so many tokens of a stream, as vLLM does."""
    stall_after: int | None = None
    """Fall silent after so many tokens, until the client leaves; 0 is before the first."""
    garbage: bool = False
    """Answer 200 with what is neither JSON nor an event."""
    healthy: bool = True
    key: str | None = None
    """What it asks for, as vLLM does with ``--api-key``: of all but ``/health`` and ``/metrics``."""
    echo: bool = False
    """Say the number in the last message, as ``<7>``, so that answers can be told apart."""
    disputes: str = ""
    """As a reference: hold every word with one of these letters unlikely when it is asked to score an
    answer."""
    knows_priority: bool = True
    """Whether it was started with priority scheduling; if not, it refuses requests that have one."""
    spaces: bool = False
    """Write JSON with spaces after colons and commas."""
    cached_tokens: int | None = None
    """Tokens of a prompt that its prefix cache has; None: it was not told to report them."""
    fingerprint: str | None = None
    """vLLM's ``system_fingerprint``."""
    usage_shape: str = "chunk"
    """Where a stream of completions has its usage: in a ``chunk`` of its own, as vLLM does; in one with an
    ``empty choice``; in the ``last`` chunk of the answer; or nowhere (``none``), in no kind of answer."""
    keep_alive_s: float = 0.0
    """Send a comment so often while there is nothing to send; 0 is never."""
