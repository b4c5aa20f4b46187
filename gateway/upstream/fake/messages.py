"""Answers of Anthropic's messages, in vLLM's shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from gateway.upstream.fake.parts import cut, event, named, next_id, pieces_of, words_of
from gateway.upstream.fake.script import Script


class Message:
    """Text, or uses of tools, a block each."""

    def __init__(self, body: dict[str, Any], text: str, script: Script) -> None:
        self._body, self._script = body, script
        self._id = next_id("msg_")
        pieces = [] if script.calls else pieces_of(text)
        self._tokens = pieces[: body.get("max_tokens") or len(pieces)]
        self._calls = named(script.calls, "toolu_")
        self.prompt = len(words_of([body.get("system"), body.get("messages")]))
        self.cached = min(script.cached_tokens or 0, self.prompt)
        self.written = len(self._tokens) + sum(len(cut(call.arguments)) for _, call in self._calls)

    def whole(self) -> dict[str, Any]:
        content: list[dict[str, Any]] = [
            _used(name, call.name, json.loads(call.arguments)) for name, call in self._calls
        ] or [{"type": "text", "text": "".join(self._tokens)}]
        return {**self._head(), "content": content, "stop_reason": self._why, "usage": self._usage()}

    def events(self) -> Iterator[tuple[int, bytes]]:
        # As vLLM has it: what was cached is known at the end only.
        started = {"input_tokens": self.prompt, "output_tokens": 0}
        yield 0, self._event("message_start", message={**self._head(), "content": [], "usage": started})
        if not self._calls:
            deltas = [{"type": "text_delta", "text": token} for token in self._tokens]
            yield from self._block(0, {"type": "text", "text": ""}, deltas)
        for index, (name, call) in enumerate(self._calls):
            parts = [{"type": "input_json_delta", "partial_json": part} for part in cut(call.arguments)]
            yield from self._block(index, _used(name, call.name, {}), parts)
        yield 0, self._event("message_delta", delta={"stop_reason": self._why}, usage=self._usage())
        yield 0, self._event("message_stop") + b"data: [DONE]\n\n"

    @property
    def _why(self) -> str:
        return "tool_use" if self._calls else "end_turn"

    def _block(
        self, index: int, begun: dict[str, Any], deltas: list[dict[str, Any]]
    ) -> Iterator[tuple[int, bytes]]:
        yield 0, self._event("content_block_start", index=index, content_block=begun)
        for delta in deltas:
            yield 1, self._event("content_block_delta", index=index, delta=delta)
        yield 0, self._event("content_block_stop", index=index)

    def _event(self, name: str, **data: Any) -> bytes:
        return event({"type": name, **data}, self._script, name)

    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._body.get("model")}

    def _usage(self) -> dict[str, Any]:
        usage = {"input_tokens": self.prompt - self.cached, "output_tokens": self.written}
        known = self._script.cached_tokens is not None
        return usage | ({"cache_read_input_tokens": self.cached} if known else {})


def _used(name: str, tool: str, given: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": name, "name": tool, "input": given}
