"""What the client asked for, against what the gateway asks the engine for on top.

The gateway wants the usage of every stream (for its books, on streams that a client cuts short as well),
and the log-probabilities of the answers it listens to (for its quality signals). What the client did not
ask for is taken out again before it is answered (``readers.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET

from gateway.config import Quality
from gateway.proxy.body import Body
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


def changes_for_engine(
    body: Body, options: OutputOptions, quality: Quality, *, tapped: bool
) -> dict[str, bytes]:
    """Fields of a completion request that an engine is sent otherwise than the client sent them, as JSON."""
    changes: dict[str, bytes] = {}
    if options.stream:
        if body.fields.stream_options is UNSET:
            changes["stream_options"] = _ALL_USAGE
        else:
            wanted = usage_wanted(body) | {"continuous_usage_stats": True}
            changes["stream_options"] = msgspec.json.encode(wanted)
    if tapped and options.chat and quality.logprobs and body.fields.takes_logprobs:
        most = max(options.top_logprobs, quality.top_logprobs)
        changes["logprobs"] = b"true"
        changes["top_logprobs"] = b"%d" % (EVERY_TOKEN if options.top_logprobs == EVERY_TOKEN else most)
    return changes


def without_logprobs(data: dict[str, Any], options: OutputOptions) -> dict[str, Any]:
    """An answer, or an event of one, with no more log-probabilities than the client asked for. The same
    object if nothing has to go."""
    choices = data.get("choices")
    if not options.chat or not isinstance(choices, list):
        return data
    kept = [_trim_choice(choice, options) for choice in choices]
    if all(new is old for new, old in zip(kept, choices, strict=True)):
        return data
    return {**data, "choices": kept}


def _trim_choice(choice: Any, options: OutputOptions) -> Any:
    logprobs = choice.get("logprobs") if isinstance(choice, dict) else None
    if not isinstance(logprobs, dict):
        return choice
    if not options.logprobs:
        return {**choice, "logprobs": None}
    content, n = logprobs.get("content"), options.top_logprobs
    if n == EVERY_TOKEN or not isinstance(content, list):
        return choice
    trimmed = [_trim_token(token, n) for token in content]
    if all(new is old for new, old in zip(trimmed, content, strict=True)):
        return choice
    return {**choice, "logprobs": {**logprobs, "content": trimmed}}


def _trim_token(token: Any, n: int) -> Any:
    likely = token.get("top_logprobs") if isinstance(token, dict) else None
    return {**token, "top_logprobs": likely[:n]} if isinstance(likely, list) and len(likely) > n else token
