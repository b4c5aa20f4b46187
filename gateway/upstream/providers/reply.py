"""LiteLLM's answers as OpenAI's JSON: every field that its schema requires, and none that is merely empty.

Written compactly, as engines write it, and a usage stands last: the readers of engines' answers read these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

_FINISHED = frozenset(("stop", "length", "tool_calls", "content_filter", "function_call"))
_TIERS = frozenset(("auto", "default", "flex", "scale", "priority"))
_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")
_DETAILS = {
    "prompt_tokens_details": ("cached_tokens", "audio_tokens"),
    "completion_tokens_details": (
        "reasoning_tokens",
        "audio_tokens",
        "accepted_prediction_tokens",
        "rejected_prediction_tokens",
    ),
}
_LIBRARYS_OWN = frozenset(("provider_specific_fields", "citations", "_response_ms", "images"))
"""Fields that LiteLLM adds; left out where they are empty."""


def chat_body(answer: Any, model: str) -> bytes:
    """A whole chat completion."""
    data = answer.model_dump()
    choices = [_choice(number, choice) for number, choice in enumerate(data.get("choices") or ())]
    return _encoded(_outer(data, model, "chat.completion", choices, usage=_usage(data.get("usage"))))


def chat_event(chunk: Any, model: str) -> bytes:
    """An event of a streamed one."""
    data = chunk.model_dump()
    usage = _usage(data.get("usage"))
    choices = [_chunk_choice(number, choice) for number, choice in enumerate(data.get("choices") or ())]
    if usage and not any(choice["delta"] or choice["finish_reason"] for choice in choices):
        choices = []  # OpenAI's usage chunk; LiteLLM's has an empty choice
    return b"data: %b\n\n" % _encoded(_outer(data, model, "chat.completion.chunk", choices, usage=usage))


def embeddings_body(answer: Any, model: str) -> bytes:
    data = answer.model_dump()
    rows = [
        {"object": "embedding", "index": _number(row.get("index"), number), "embedding": row["embedding"]}
        for number, row in enumerate(map(_as_mapping, data.get("data") or ()))
    ]
    usage = _usage(data.get("usage")) or {}
    counted = {name: usage[name] for name in ("prompt_tokens", "total_tokens") if name in usage}
    return _encoded({"object": "list", "data": rows, "model": model, "usage": counted})


def finishes(chunk: Any) -> bool:
    """Whether a chunk says that a choice has ended."""
    return any(getattr(choice, "finish_reason", None) for choice in getattr(chunk, "choices", None) or ())


def _outer(
    data: Mapping[str, Any],
    model: str,
    kind: str,
    choices: list[dict[str, Any]],
    usage: dict[str, Any] | None,
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "id": str(data.get("id") or "chatcmpl-0"),
        "object": kind,
        "created": int(data.get("created") or 0),
        "model": model,
        "choices": choices,
    }
    if isinstance(data.get("system_fingerprint"), str):
        result["system_fingerprint"] = data["system_fingerprint"]
    if data.get("service_tier") in _TIERS:
        result["service_tier"] = data["service_tier"]
    if usage:
        result["usage"] = usage
    return result


def _choice(number: int, choice: Mapping[str, Any]) -> dict[str, Any]:
    said = choice.get("message") or {}
    message = {
        "role": "assistant",
        "content": said.get("content"),
        "refusal": said.get("refusal"),
        **_without_empty(said, ("role", "content", "refusal", "tool_calls", "annotations")),
    }
    if calls := said.get("tool_calls"):
        message["tool_calls"] = [_call(call) for call in calls]
    if annotations := said.get("annotations"):
        message["annotations"] = annotations
    finish = choice.get("finish_reason")
    return {
        "index": _number(choice.get("index"), number),
        "message": message,
        "logprobs": _logprobs(choice.get("logprobs")),
        "finish_reason": finish if finish in _FINISHED else "stop",
    }


def _chunk_choice(number: int, choice: Mapping[str, Any]) -> dict[str, Any]:
    said = choice.get("delta") or {}
    delta: dict[str, Any] = {}
    if said.get("role"):
        delta["role"] = said["role"]
        delta["content"] = said.get("content")
    elif said.get("content"):
        delta["content"] = said["content"]
    delta |= _without_empty(said, ("role", "content", "tool_calls", "annotations"))
    if calls := said.get("tool_calls"):
        delta["tool_calls"] = [
            {"index": _number(call.get("index"), position), **_call(call, begun=bool(call.get("id")))}
            for position, call in enumerate(calls)
        ]
    finish = choice.get("finish_reason")
    return {
        "index": _number(choice.get("index"), number),
        "delta": delta,
        "logprobs": _logprobs(choice.get("logprobs")),
        "finish_reason": finish if finish is None or finish in _FINISHED else "stop",
    }


def _call(call: Mapping[str, Any], *, begun: bool = True) -> dict[str, Any]:
    """A tool call, or the part of one that ``begun`` earlier: that has neither id nor name."""
    function = call.get("function") or {}
    result = _without_empty(call, ("index", "function", "id", "type"))
    if begun:
        result |= {"id": str(call.get("id") or ""), "type": call.get("type") or "function"}
    said = {"name": function["name"]} if function.get("name") else {}
    said["arguments"] = function.get("arguments") or ""
    return result | {"function": said}


def _logprobs(logprobs: Any) -> dict[str, Any] | None:
    """With the nulls that belong there: a token's bytes, a list that was not asked for."""
    if not isinstance(logprobs, Mapping):
        return None
    return {"content": logprobs.get("content"), "refusal": logprobs.get("refusal")}


def _usage(usage: Any) -> dict[str, Any] | None:
    """OpenAI's counts alone. None where nothing was counted."""
    if not isinstance(usage, Mapping):
        return None
    result: dict[str, Any] = _counts(usage, _COUNTS)
    for name, fields in _DETAILS.items():
        if isinstance(usage.get(name), Mapping) and (details := _counts(usage[name], fields)):
            result[name] = details
    return result or None


def _counts(given: Mapping[str, Any], names: Iterable[str]) -> dict[str, int]:
    return {name: int(given[name]) for name in names if isinstance(given.get(name), int | float)}


def _without_empty(given: Mapping[str, Any], besides: Iterable[str]) -> dict[str, Any]:
    """What else a provider says (its reasoning, its audio), without nulls."""
    left_out = frozenset(besides)
    return {
        name: value
        for name, value in given.items()
        if name not in left_out and value is not None and (value or name not in _LIBRARYS_OWN)
    }


def _number(value: Any, default: int) -> int:
    return value if isinstance(value, int) else default


def _as_mapping(row: Any) -> Mapping[str, Any]:
    return row if isinstance(row, Mapping) else row.model_dump()


def _encoded(data: Any) -> bytes:
    return msgspec.json.encode(data, enc_hook=str)
