"""Answers of chat and of text completions, in vLLM's shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gateway.upstream.fake.parts import counts, cut, event, logprob, named, pieces_of, prompts_of
from gateway.upstream.fake.script import Script


class Completion:
    """Of chat and of text completions, ``n`` for each prompt."""

    def __init__(self, body: dict[str, Any], text: str, script: Script, *, chat: bool) -> None:
        self._body, self._script, self._chat = body, script, chat
        pieces = [] if script.calls else pieces_of(text)
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or len(pieces)
        self._tokens = pieces[: int(limit)]
        self._finish = "stop" if len(self._tokens) == len(pieces) else "length"
        self._calls = named(script.calls, "call_")
        if self._calls:
            self._finish = "tool_calls"
        self._deltas = list(self._said())
        self._n = body.get("n") or 1
        self._prompts = [len(words) for words in prompts_of(body)]
        self.prompt = sum(self._prompts)
        self.cached = min(script.cached_tokens or 0, self.prompt)
        self._choices = self._n * len(self._prompts)
        self.written = len(self._deltas) * self._choices

    def whole(self) -> dict[str, Any]:
        text = "".join(self._tokens)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self._calls:
            used = [_used(name, call.name, call.arguments) for name, call in self._calls]
            message |= {"content": None, "tool_calls": used}
        said = {"message": message} if self._chat else {"text": text}
        choices = [
            {"index": index, **said, "logprobs": self._logprobs(self._tokens), "finish_reason": self._finish}
            for index in range(self._choices)
        ]
        answer = {**self._head(""), "choices": choices}
        if self._script.usage_shape != "none":
            answer["usage"] = self._usage()
        return answer | self._fingerprint()

    def events(self) -> Iterator[tuple[int, bytes]]:
        for step in range(len(self._deltas)):
            for index in range(self._choices):
                yield 1, event(self._chunk(step, index), self._script)
        shape = self._script.usage_shape
        if self._wants("include_usage") and shape in ("chunk", "empty choice"):
            choices = [{"index": 0, "delta": {}}] if shape == "empty choice" else []
            last = {**self._head(".chunk"), "choices": choices, "usage": self._usage(), **self._fingerprint()}
            yield 0, event(last, self._script)
        yield 0, b"data: [DONE]\n\n"

    def _said(self) -> Iterator[dict[str, Any]]:
        """What each step adds to a choice: a token, or a part of a call."""
        for index, (name, call) in enumerate(self._calls):
            yield {"tool_calls": [{"index": index, **_used(name, call.name, "")}]}
            for part in cut(call.arguments):
                yield {"tool_calls": [{"index": index, "function": {"arguments": part}}]}
        for token in self._tokens:
            yield {"content": token}

    def _chunk(self, step: int, index: int) -> dict[str, Any]:
        ends = step == len(self._deltas) - 1
        role = {"role": "assistant"} if step == 0 else {}
        delta = self._deltas[step]
        said = {"delta": {**role, **delta}} if self._chat else {"text": delta["content"]}
        logprobs = None if self._calls else self._logprobs([delta["content"]])
        finish = self._finish if ends else None
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}
        chunk: dict[str, Any] = {**self._head(".chunk"), "choices": [choice]}
        shape = self._script.usage_shape
        if shape == "last" and ends and index == self._choices - 1:
            chunk["usage"] = self._usage()
        elif shape in ("chunk", "empty choice") and self._wants("include_usage", "continuous_usage_stats"):
            chunk["usage"] = counts(self._prompts[index // self._n], step + 1)
        return chunk | (self._fingerprint() if ends and not self._wants("include_usage") else {})

    def _wants(self, *names: str) -> bool:
        options = self._body.get("stream_options") or {}
        return all(options.get(name) for name in names)

    def _head(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self._chat else "text_completion"
        return {"id": "fake-1", "object": kind, "created": 1, "model": self._body.get("model")}

    def _usage(self) -> dict[str, Any]:
        usage = counts(self.prompt, self.written)
        if self._script.cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached}
        return usage

    def _fingerprint(self) -> dict[str, Any]:
        return {"system_fingerprint": self._script.fingerprint} if self._script.fingerprint else {}

    def _logprobs(self, tokens: list[str]) -> dict[str, Any] | None:
        if not self._chat or not self._body.get("logprobs"):
            return None
        k = self._body.get("top_logprobs") or 0
        return {"content": [logprob(token, k) for token in tokens]}


def _used(name: str, function: str, arguments: str) -> dict[str, Any]:
    return {"id": name, "type": "function", "function": {"name": function, "arguments": arguments}}
