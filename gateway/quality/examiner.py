"""What engines are asked about an answer, and what of their answers is read. Runs beside the event loop: an
engine is asked by handing out a body as bytes, and its answer comes back as bytes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from gateway.quality.transcript import Transcript, read_object

Request = Mapping[str, Any]
Asking = Callable[[str, str, bytes], Awaitable[bytes]]
"""Variant (or nothing, for the judge), path and JSON body to the engine's answer. Raises UnansweredError."""

CHAT, COMPLETIONS, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"
_NOT_ASKED_AGAIN = frozenset(
    "stream stream_options model n logprobs top_logprobs prompt_logprobs echo priority request_id "
    "kv_transfer_params".split()
)
"""Fields of a request that are about how its client is answered, or that an engine takes once."""
_RENDERED_BY = ("tools", "chat_template_kwargs", "chat_template")
"""Fields that decide how a conversation becomes a prompt."""


class UnansweredError(RuntimeError):
    """An engine did not give what was asked for. The text quotes nothing of what it said."""


class Examiner:
    """Asks about one answer. ``cache_salt``: the tenant's, which every engine is given: the time that a
    cached prefix takes would tell other tenants of it."""

    def __init__(self, ask: Asking, cache_salt: str = "") -> None:
        self._ask = ask
        self._cache_salt = cache_salt

    async def rows(self, reference: str, request: Request, text: str) -> list[Any]:
        """What the reference thinks of each token of ``text`` as an answer to ``request``; shape (tokens,).
        Raises UnansweredError."""
        shared = {name: request[name] for name in _RENDERED_BY if name in request}
        if "messages" in request:
            prompt = {"messages": request["messages"], "add_generation_prompt": True, **shared}
            whole = {
                "messages": [*request["messages"], {"role": "assistant", "content": text}],
                "add_generation_prompt": False,
                "continue_final_message": True,
                **shared,
            }
            if "tools" in request:
                whole["tool_choice"] = "none"
        else:
            prompt = {"prompt": request["prompt"]}
            whole = {"prompt": request["prompt"] + text}
        counted = (await self._post(reference, TOKENIZE, prompt)).get("count")
        if not isinstance(counted, int):
            raise UnansweredError(f"{reference} does not count tokens")
        score = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
        reply = await self._post(reference, _path(request), self._salted(request, {**whole, **score}))
        rows = reply.get("prompt_logprobs")
        if rows is None:
            rows = _choice(reply).get("prompt_logprobs")
        if not isinstance(rows, list):
            raise UnansweredError(f"{reference} gives no prompt_logprobs")
        return rows[counted:]

    async def answer(self, variant: str, request: Request, **more: Any) -> Transcript:
        """A variant's own answer to the same request. Raises UnansweredError."""
        body = {name: value for name, value in request.items() if name not in _NOT_ASKED_AGAIN}
        reply = await self._post(variant, _path(request), self._salted(request, {**body, **more}))
        if not _choice(reply):
            raise UnansweredError(f"{variant} gave no answer")
        made = Transcript()
        made.add(reply)
        return made

    async def judge(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The judge's answer. Raises UnansweredError."""
        return await self._post("", CHAT, self._salted({}, body))

    def _salted(self, request: Request, body: Mapping[str, Any]) -> dict[str, Any]:
        salt = self._cache_salt or request.get("cache_salt")
        return {**body, "cache_salt": salt} if salt else dict(body)

    async def _post(self, variant: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            raw = msgspec.json.encode(body)
        except (msgspec.MsgspecError, ValueError, TypeError, RecursionError):
            raise UnansweredError("the request cannot be asked again") from None
        reply = read_object(await self._ask(variant, path, raw))
        if reply is None:
            raise UnansweredError(f"{variant or 'the judge'} answered {path} with what is no JSON object")
        return reply


def _path(request: Request) -> str:
    return CHAT if "messages" in request else COMPLETIONS


def _choice(reply: Mapping[str, Any]) -> dict[str, Any]:
    """The first one; empty where there is none."""
    choices = reply.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else {}
