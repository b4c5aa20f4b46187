"""What the client asked for, against what the gateway asks the engine for on top.

The gateway wants the usage of every stream (for its books, on streams that a client cuts short as well),
and the log-probabilities of the answers it listens to (for its quality signals). What the client did not
ask for is taken out again before it is answered.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET

from gateway.config import Quality
from gateway.proxy.body import Body, RequestFields
from gateway.upstream.sse import ServerEvent

_ALL_USAGE = b'{"include_usage":true,"continuous_usage_stats":true}'
EVERY_TOKEN = -1
"""vLLM's ``top_logprobs`` for the whole vocabulary."""


@dataclass(frozen=True, slots=True)
class OutputOptions:
    chat: bool
    stream: bool
    logprobs: bool = False
    top_logprobs: int = 0
    include_usage: bool = False
    continuous_usage: bool = False

    @classmethod
    def of(cls, asked: RequestFields, *, chat: bool) -> OutputOptions:
        if asked.stream_options is UNSET and asked.logprobs is UNSET and asked.top_logprobs is UNSET:
            return _COMMON[chat, asked.stream is True]
        options = asked.stream_options or {}
        as_it_is = chat and not asked.takes_logprobs  # nothing is added, so nothing is to be taken out
        return cls(
            chat=chat,
            stream=asked.stream is True,
            logprobs=as_it_is or asked.logprobs is True,
            top_logprobs=EVERY_TOKEN if as_it_is else (asked.top_logprobs or 0) if chat else 0,
            include_usage=bool(options.get("include_usage")),
            continuous_usage=bool(options.get("continuous_usage_stats")),
        )


_COMMON = {(chat, stream): OutputOptions(chat, stream) for chat in (False, True) for stream in (False, True)}
WHOLE, STREAM = _COMMON[False, False], _COMMON[False, True]


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


def as_wished(event: ServerEvent, options: OutputOptions) -> bytes:
    """The bytes of ``event`` that the client gets; its ``data`` is left as it is."""
    data = event.data
    if data is None or "error" in data:
        return event.raw
    if options.stream and data.get("usage") is not None and not data.get("choices"):
        return event.raw if options.include_usage else b""
    trimmed = _trim(data, options)
    if trimmed is data:
        return event.raw
    text = json.dumps(trimmed, separators=(",", ":")).encode()
    return b"data: " + text + b"\n\n" if options.stream else text


def _trim(data: dict[str, Any], options: OutputOptions) -> dict[str, Any]:
    """The same object if nothing has to go."""
    result = data
    if options.stream and "usage" in data and not (options.include_usage and options.continuous_usage):
        result = {key: value for key, value in data.items() if key != "usage"}
    choices = data.get("choices")
    if options.chat and isinstance(choices, list):
        kept = [_trim_choice(choice, options) for choice in choices]
        if any(new is not old for new, old in zip(kept, choices, strict=True)):
            result = {**result, "choices": kept}
    return result


def _trim_choice(choice: Any, options: OutputOptions) -> Any:
    logprobs = choice.get("logprobs") if isinstance(choice, dict) else None
    if not isinstance(logprobs, dict):
        return choice
    if not options.logprobs:
        return {**choice, "logprobs": None}
    content = logprobs.get("content")
    if options.top_logprobs == EVERY_TOKEN or not isinstance(content, list):
        return choice
    n = options.top_logprobs
    if all(len(token.get("top_logprobs") or ()) <= n for token in content):
        return choice
    trimmed = [{**token, "top_logprobs": (token.get("top_logprobs") or [])[:n]} for token in content]
    return {**choice, "logprobs": {**logprobs, "content": trimmed}}
