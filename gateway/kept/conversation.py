"""What is kept of a request and its answer, and what cannot be. Runs beside the event loop.

Of a request that becomes an item: its messages, the schema of its answer, how its chat template was filled;
redacted. Of an answer that the reference is to score: what the reference needs, and nothing that says who
asked. A score of changed text would say nothing, so an answer in which anything would be redacted, question
or answer, is not kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from gateway.kept.redact import Redactor
from gateway.quality.records import AnswerRecord, Kept, Unfit, encode
from gateway.quality.transcript import Transcript

LONGEST = 64 << 10
"""Bytes of a request that is kept at most: the user's own patterns take some µs a character."""
_SCORED_WITH = (
    "messages prompt tools tool_choice parallel_tool_calls chat_template chat_template_kwargs "
    "response_format structured_outputs guided_json guided_regex guided_choice guided_grammar max_tokens "
    "max_completion_tokens temperature top_p top_k min_p stop seed presence_penalty frequency_penalty "
    "repetition_penalty reasoning_effort"
).split()
"""Fields of a request by which an answer comes to be. Whatever else there is may say who asked."""
_OTHERWISE_GUIDED = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
_ROLES = ("system", "user", "assistant")

Kind = Literal["request", "answer"]


class Asked(msgspec.Struct):
    """A request that can become an item."""

    messages: list[dict[str, str]]
    json_schema: dict[str, Any] | None = None
    """Of the answer, where the engine was told to guide it."""
    template: dict[str, Any] | None = None
    """For the chat template."""
    max_tokens: int | None = None

    def __repr__(self) -> str:
        return f"Asked({len(self.messages)} messages)"


def asked_of(request: Mapping[str, Any], redactor: Redactor) -> Kept | Unfit:
    """A request as it is kept for an item."""
    messages = _messages(request.get("messages"))
    guided, schema = _schema(request)
    if messages is None or not guided or request.get("tools") or request.get("functions"):
        return Unfit.FORM
    template = request.get("chat_template_kwargs")
    most = request.get("max_completion_tokens") or request.get("max_tokens")
    asked = Asked(
        redactor.value(messages),
        redactor.value(schema) if schema is not None else None,
        redactor.value(template) if isinstance(template, dict) and template else None,
        most if isinstance(most, int) and most > 0 else None,
    )
    return Kept(msgspec.msgpack.encode(asked))


def answer_of(request: Mapping[str, Any], answer: Transcript, redactor: Redactor) -> Kept | Unfit:
    """A request and its answer as they are kept for the reference: an ``AnswerRecord``."""
    asked = {name: request[name] for name in _SCORED_WITH if name in request}
    if len(answer.texts) != 1 or not answer.tokens:
        return Unfit.FORM
    said = [answer.texts[0], [list(call) for call in answer.tool_calls]]
    if redactor.value(asked) != asked or redactor.value(said) != said:
        return Unfit.REDACTED
    calls = [{"function": {"name": name, "arguments": text}} for name, text in answer.tool_calls]
    message = {"content": answer.texts[0], **({"tool_calls": calls} if calls else {})}
    tokens = [{"token": token, "logprob": logprob} for token, logprob in answer.tokens]
    whole = {"choices": [{"index": 0, "message": message, "logprobs": {"content": tokens}}]}
    return Kept(encode(AnswerRecord(json.dumps(asked).encode(), [json.dumps(whole).encode()])))


def read_asked(data: bytes) -> Asked:
    """Raises msgspec.MsgspecError."""
    return msgspec.msgpack.decode(data, type=Asked)


def _messages(given: Any) -> list[dict[str, str]] | None:
    """Messages of texts alone; None where there is anything else among them."""
    if not isinstance(given, list) or not given:
        return None
    found = []
    for one in given:
        if not isinstance(one, dict) or one.get("role") not in _ROLES or one.get("tool_calls"):
            return None
        content = one.get("content")
        if isinstance(content, list):
            texts = [part.get("text") if isinstance(part, dict) else None for part in content]
            if not all(isinstance(text, str) for text in texts):
                return None
            content = "".join(text for text in texts if text)
        if not isinstance(content, str):
            return None
        found.append({"role": one["role"], "content": content})
    return found if found[-1]["role"] == "user" else None


def _schema(request: Mapping[str, Any]) -> tuple[bool, dict[str, Any] | None]:
    """Whether an item can say how the answer was guided, and the schema."""
    if any(request.get(name) is not None for name in _OTHERWISE_GUIDED):
        return False, None
    wanted = request.get("response_format")
    if not isinstance(wanted, dict) or wanted.get("type") == "text":
        return wanted is None or isinstance(wanted, dict), None
    inner = wanted.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    return (
        (True, schema) if wanted.get("type") == "json_schema" and isinstance(schema, dict) else (False, None)
    )
