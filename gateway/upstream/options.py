"""What the client asked for, against what the gateway asks the engine for on top.

The gateway wants the usage of every stream (for its books, on streams that a client cuts short as well),
and the log-probabilities of the answers it listens to (for its quality signals). What the client did not
ask for is taken out again before it is answered (``readers.py``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET

from gateway.config import Quality
from gateway.errors import BadRequestError
from gateway.proxy.body import TOO_DEEP, Body
from gateway.proxy.fields import RequestFields
from gateway.upstream.sse import UNREADABLE

_ALL_USAGE = b'{"include_usage":true,"continuous_usage_stats":true}'
EVERY_TOKEN = -1
"""vLLM's ``top_logprobs`` for the whole vocabulary."""


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What the client wants of its answer."""

    chat: bool
    stream: bool
    logprobs: bool = False
    top_logprobs: int = 0
    include_usage: bool = False
    """A chunk with the usage at the end of its stream."""
    continuous_usage: bool = False
    """With ``include_usage``: a usage in every chunk as well."""
    prompts: int = 1
    """Prompts in one request for completions, each of which gets ``n`` answers."""
    n: int = 1
    """Answers to each of several prompts. (How many one prompt gets does not matter here.)"""

    @classmethod
    def of(cls, asked: RequestFields, *, chat: bool, body: Body | None = None) -> OutputOptions:
        """``body`` is looked at for several prompts, which only a request for completions can have."""
        prompts = 1 if chat or body is None or asked.stream is not True else _prompts(body)
        if prompts == 1 and asked.stream_options is UNSET and asked.logprobs is asked.top_logprobs is UNSET:
            return _COMMON[chat, asked.stream is True]
        options = asked.stream_options or {}
        as_it_is = chat and not asked.takes_logprobs  # nothing is added, so nothing is to be taken out
        n = asked.n if prompts > 1 else 1
        return cls(
            chat=chat,
            stream=asked.stream is True,
            logprobs=as_it_is or asked.logprobs is True,
            top_logprobs=EVERY_TOKEN if as_it_is else (asked.top_logprobs or 0) if chat else 0,
            include_usage=bool(options.get("include_usage")),
            continuous_usage=bool(options.get("continuous_usage_stats")),
            prompts=prompts,
            n=n if isinstance(n, int) and n > 0 else 1,
        )


_COMMON = {(chat, stream): OutputOptions(chat, stream) for chat in (False, True) for stream in (False, True)}
WHOLE, STREAM = _COMMON[False, False], _COMMON[False, True]
_LIST = msgspec.json.Decoder(list[msgspec.Raw])


def _prompts(body: Body) -> int:
    """A text is one prompt, a list of token ids too; a list of either is many."""
    if body.prompts is not None:
        return body.prompts
    raw = body.raw("prompt").lstrip()
    if not raw.startswith(b"["):
        return 1
    try:
        items = _LIST.decode(raw)
    except UNREADABLE:
        return 1
    return len(items) if items and bytes(items[0])[:1] in (b'"', b"[") else 1


def usage_wanted(body: Body) -> dict[str, Any]:
    """Stream options that ask for the usage, whatever else they ask for."""
    return {**(body.fields.stream_options or {}), "include_usage": True}


def _as_it_was_read(wanted: dict[str, Any]) -> bytes:
    """What a client has put in besides is the engine's: halves of characters, NaN, numbers of any size.
    Raises BadRequestError."""
    try:
        return json.dumps(wanted, separators=(",", ":")).encode()
    except RecursionError:  # it was read with less below it
        raise BadRequestError(TOO_DEEP, param="stream_options") from None


def changes_for_engine(
    body: Body, options: OutputOptions, quality: Quality, *, tapped: bool
) -> dict[str, bytes]:
    """Fields of a completion request that an engine is sent otherwise than the client sent them, as JSON.
    Raises BadRequestError."""
    changes: dict[str, bytes] = {}
    if options.stream:
        if body.fields.stream_options is UNSET:
            changes["stream_options"] = _ALL_USAGE
        else:
            wanted = usage_wanted(body) | {"continuous_usage_stats": True}
            changes["stream_options"] = _as_it_was_read(wanted)
    if tapped and options.chat and quality.logprobs and body.fields.takes_logprobs:
        most = max(options.top_logprobs, quality.top_logprobs)
        changes["logprobs"] = b"true"
        changes["top_logprobs"] = b"%d" % (EVERY_TOKEN if options.top_logprobs == EVERY_TOKEN else most)
    return changes
