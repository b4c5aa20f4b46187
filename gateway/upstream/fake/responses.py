"""Answers of OpenAI's responses, in vLLM's shapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from gateway.upstream.fake.parts import cut, event, named, next_id, pieces_of, words_of
from gateway.upstream.fake.script import Call, Script


class Response:
    """A message, or calls of functions, an item each."""

    def __init__(self, body: dict[str, Any], text: str, script: Script) -> None:
        self._body, self._script = body, script
        self._id = body.get("request_id") or next_id("resp_")
        self._message = next_id("msg_")
        self._numbers = itertools.count()
        pieces = [] if script.calls else pieces_of(text)
        self._tokens = pieces[: body.get("max_output_tokens") or len(pieces)]
        self._calls = named(script.calls, "call_")
        self.prompt = len(words_of([body.get("instructions"), body.get("input")]))
        self.cached = min(script.cached_tokens or 0, self.prompt)
        self.written = len(self._tokens) + sum(len(cut(call.arguments)) for _, call in self._calls)

    def whole(self) -> dict[str, Any]:
        usage = {
            "input_tokens": self.prompt,
            "input_tokens_details": {"cached_tokens": self.cached},
            "output_tokens": self.written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt + self.written,
        }
        return {**self._head("completed"), "output": self._items(), "usage": usage}

    def events(self) -> Iterator[tuple[int, bytes]]:
        begun = {**self._head("in_progress"), "output": [], "usage": None}
        yield 0, self._event("response.created", response=begun)
        yield 0, self._event("response.in_progress", response=begun)
        if not self._calls:
            yield from self._said()
        for index, (name, call) in enumerate(self._calls):
            yield from self._called(index, name, call)
        yield 0, self._event("response.completed", response=self.whole())

    def _items(self) -> list[dict[str, Any]]:
        if self._calls:
            return [_called(name, call, "completed", call.arguments) for name, call in self._calls]
        return [self._item("completed", [_text("".join(self._tokens))])]

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        told = {"type": "message", "id": self._message, "role": "assistant", "status": status}
        return told | {"content": content}

    def _said(self) -> Iterator[tuple[int, bytes]]:
        text = "".join(self._tokens)
        (done,) = self._items()
        place = {"output_index": 0}
        part = {**place, "item_id": self._message, "content_index": 0}
        yield 0, self._event("response.output_item.added", **place, item=self._item("in_progress", []))
        yield 0, self._event("response.content_part.added", **part, part=_text(""))
        for token in self._tokens:
            yield 1, self._event("response.output_text.delta", **part, delta=token, logprobs=[])
        yield 0, self._event("response.output_text.done", **part, text=text, logprobs=[])
        yield 0, self._event("response.content_part.done", **part, part=_text(text))
        yield 0, self._event("response.output_item.done", **place, item=done)

    def _called(self, index: int, name: str, call: Call) -> Iterator[tuple[int, bytes]]:
        place = {"output_index": index}
        kind = "response.function_call_arguments"
        begun = _called(name, call, "in_progress", "")
        of = {**place, "item_id": begun["id"]}
        yield 0, self._event("response.output_item.added", **place, item=begun)
        for delta in cut(call.arguments):
            yield 1, self._event(f"{kind}.delta", **of, delta=delta)
        yield 0, self._event(f"{kind}.done", **of, name=call.name, arguments=call.arguments)
        done = _called(name, call, "completed", call.arguments)
        yield 0, self._event("response.output_item.done", **place, item=done)

    def _event(self, name: str, /, **data: Any) -> bytes:
        numbered = {"type": name, "sequence_number": next(self._numbers), **data}
        return event(numbered, self._script, name)

    def _head(self, status: str) -> dict[str, Any]:
        asked = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": 1,
            "status": status,
            "model": asked.get("model"),
            "parallel_tool_calls": True,
            "tool_choice": asked.get("tool_choice") or "auto",
            "tools": asked.get("tools") or [],
        }


def _called(name: str, call: Call, status: str, arguments: str) -> dict[str, Any]:
    told = {"type": "function_call", "id": f"fc_{name}", "call_id": name, "status": status}
    return told | {"name": call.name, "arguments": arguments}


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}
