"""The usage of an answer, in the words of every protocol that engines and providers speak.

=================== ======================== ============================ ====================
protocol            prompt                   of it from the prefix cache  written
=================== ======================== ============================ ====================
completions, chat   ``prompt_tokens``        ``prompt_tokens_details``    ``completion_tokens``
embeddings, rerank, ``prompt_tokens``, or    the same                     none
score, pooling      all of ``total_tokens``
responses           ``input_tokens``         ``input_tokens_details``     ``output_tokens``
Anthropic messages  ``input_tokens`` and     ``cache_read_input_tokens``  ``output_tokens``
                    both ``cache_…`` fields
Cohere embed        ``meta.billed_units``    none                         none
=================== ======================== ============================ ====================

Anthropic's ``input_tokens`` leave out what the cache had (``cache_read_input_tokens``) and what was put
there (``cache_creation_input_tokens``); the prompt is the sum of the three.
"""

from __future__ import annotations

from typing import TypeGuard

import msgspec

from gateway.proxy.record import NO_USAGE, Usage
from gateway.upstream.sse import UNREADABLE

Raw = msgspec.Raw
NOT_GIVEN = Raw()
"""A field of JSON that is absent."""
MOST_TOKENS = 1 << 40
"""A count above this is no count: it would spoil a counter for good."""


class Details(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class Counts(msgspec.Struct, gc=False):
    """Every name that a count goes by."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    prompt_tokens_details: Details | None = None
    input_tokens_details: Details | None = None


_DECODER = msgspec.json.Decoder(Counts, strict=False)


def usage_of(raw: bytes | Raw, before: Usage = NO_USAGE, *, exact: bool = True) -> Usage:
    """Read one ``usage`` object (JSON). What it does not name stays as it was in ``before``: Anthropic's
    streams give the prompt at their beginning and the rest at their end. ``before`` also stays where the
    object cannot be read. ``exact``: this is the engine's last word."""
    try:
        counts = _DECODER.decode(raw)
    except UNREADABLE:
        return before
    return counted(counts, before, exact=exact)


def counted(counts: Counts, before: Usage = NO_USAGE, *, exact: bool = True) -> Usage:
    """The usage that one ``usage`` object says. The cache has had no more of a prompt than there is of it."""
    prompt, completion = counts.prompt_tokens, counts.completion_tokens
    if (
        prompt is not None
        and completion is not None
        and counts.prompt_tokens_details is None
        and 0 <= prompt <= MOST_TOKENS
        and 0 <= completion <= MOST_TOKENS
    ):
        return Usage(prompt, min(before.cached, prompt), completion, exact)  # nearly always
    if prompt is None and counts.input_tokens is not None:
        read, created = counts.cache_read_input_tokens, counts.cache_creation_input_tokens
        prompt = counts.input_tokens + max(0, read or 0) + max(0, created or 0)
    if completion is None:
        completion = counts.output_tokens
    if prompt is None and completion is None:
        prompt = counts.total_tokens
    details = counts.prompt_tokens_details or counts.input_tokens_details
    cached = counts.cache_read_input_tokens if details is None else details.cached_tokens
    if (prompt, completion) == (None, None):
        return before
    prompt = before.prompt if prompt is None else sane(prompt)
    return Usage(
        prompt,
        min(before.cached if cached is None else sane(cached), prompt or 0),
        before.completion if completion is None else sane(completion),
        exact,
    )


def is_count(value: object) -> TypeGuard[int]:
    """Whether it may be a number of tokens."""
    return type(value) is int and 0 <= value <= MOST_TOKENS


def sane(count: int) -> int:
    """0 for what is no count."""
    return count if is_count(count) else 0


def is_null(raw: Raw) -> bool:
    """Whether a field is absent or null."""
    return raw is NOT_GIVEN or bytes(raw) == b"null"
