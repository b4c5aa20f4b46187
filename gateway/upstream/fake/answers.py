"""Answers in vLLM's shapes, cut into tokens at spaces: each protocol's, whole and as events of a stream."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any, Protocol

from gateway.upstream.fake.script import Script

TOKEN_P = 0.9
"""Probability of every token that a fake engine says; its alternatives share half of the rest."""
_numbers = itertools.count(1)


class Answer(Protocol):
    """``prompt``: tokens taken in, of them ``cached``. ``written``: those of all choices at the end."""

    prompt: int
    cached: int
    written: int

    def whole(self) -> dict[str, Any]: ...

    def events(self) -> Iterator[tuple[int, bytes]]:
        """Each with the tokens that it is the first to show."""
        ...


def answer_for(path: str, body: dict[str, Any], text: str, script: Script) -> Answer:
    if path.endswith("/messages"):
        return Message(body, text, script)
    if path.endswith("/responses"):
        return Response(body, text, script)
    return Completion(body, text, script, chat=path.endswith("/chat/completions"))


class Completion:
    """Of chat and of text completions, ``n`` for each prompt."""

    def __init__(self, body: dict[str, Any], text: str, script: Script, *, chat: bool) -> None:
        self._body, self._script, self._chat = body, script, chat
        pieces = pieces_of(text)
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or len(pieces)
        self._tokens = pieces[: int(limit)]
        self._finish = "stop" if len(self._tokens) == len(pieces) else "length"
        self._n = body.get("n") or 1
        self._prompts = [len(words) for words in prompts_of(body)]
        self.prompt = sum(self._prompts)
        self.cached = min(script.cached_tokens or 0, self.prompt)
        self._choices = self._n * len(self._prompts)
        self.written = len(self._tokens) * self._choices

    def whole(self) -> dict[str, Any]:
        text = "".join(self._tokens)
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choices = [
            {"index": index, **said, "logprobs": self._logprobs(self._tokens), "finish_reason": self._finish}
            for index in range(self._choices)
        ]
        answer = {**self._head(""), "choices": choices}
        if self._script.usage_shape != "none":
            answer["usage"] = self._usage()
        return answer | self._fingerprint()

    def events(self) -> Iterator[tuple[int, bytes]]:
        for step in range(len(self._tokens)):
            for index in range(self._choices):
                yield 1, event(self._chunk(step, index), self._script)
        shape = self._script.usage_shape
        if self._wants("include_usage") and shape in ("chunk", "empty choice"):
            choices = [{"index": 0, "delta": {}}] if shape == "empty choice" else []
            last = {**self._head(".chunk"), "choices": choices, "usage": self._usage(), **self._fingerprint()}
            yield 0, event(last, self._script)
        yield 0, b"data: [DONE]\n\n"

    def _chunk(self, step: int, index: int) -> dict[str, Any]:
        token, ends = self._tokens[step], step == len(self._tokens) - 1
        role = {"role": "assistant"} if step == 0 else {}
        said = {"delta": {**role, "content": token}} if self._chat else {"text": token}
        finish = self._finish if ends else None
        choice = {"index": index, **said, "logprobs": self._logprobs([token]), "finish_reason": finish}
        chunk: dict[str, Any] = {**self._head(".chunk"), "choices": [choice]}
        shape = self._script.usage_shape
        if shape == "last" and ends and index == self._choices - 1:
            chunk["usage"] = self._usage()
        elif shape in ("chunk", "empty choice") and self._wants("include_usage", "continuous_usage_stats"):
            chunk["usage"] = _counts(self._prompts[index // self._n], step + 1)
        return chunk | (self._fingerprint() if ends and not self._wants("include_usage") else {})

    def _wants(self, *names: str) -> bool:
        options = self._body.get("stream_options") or {}
        return all(options.get(name) for name in names)

    def _head(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self._chat else "text_completion"
        return {"id": "fake-1", "object": kind, "created": 1, "model": self._body.get("model")}

    def _usage(self) -> dict[str, Any]:
        usage = _counts(self.prompt, self.written)
        if self._script.cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached}
        return usage

    def _fingerprint(self) -> dict[str, Any]:
        return {"system_fingerprint": self._script.fingerprint} if self._script.fingerprint else {}

    def _logprobs(self, tokens: list[str]) -> dict[str, Any] | None:
        if not self._chat or not self._body.get("logprobs"):
            return None
        k = self._body.get("top_logprobs") or 0
        return {"content": [_logprob(token, k) for token in tokens]}


class Message:
    """Of Anthropic's messages."""

    def __init__(self, body: dict[str, Any], text: str, script: Script) -> None:
        self._body, self._script = body, script
        pieces = pieces_of(text)
        self._tokens = pieces[: body.get("max_tokens") or len(pieces)]
        self.prompt = len(_words([body.get("system"), body.get("messages")]))
        self.cached = min(script.cached_tokens or 0, self.prompt)
        self.written = len(self._tokens)

    def whole(self) -> dict[str, Any]:
        content = [{"type": "text", "text": "".join(self._tokens)}]
        return {**self._head(), "content": content, "stop_reason": "end_turn", "usage": self._usage()}

    def events(self) -> Iterator[tuple[int, bytes]]:
        # As vLLM has it: what was cached is known at the end only.
        started = {"input_tokens": self.prompt, "output_tokens": 0}
        yield 0, self._event("message_start", message={**self._head(), "content": [], "usage": started})
        yield 0, self._event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        for token in self._tokens:
            yield 1, self._event("content_block_delta", index=0, delta={"type": "text_delta", "text": token})
        yield 0, self._event("content_block_stop", index=0)
        yield 0, self._event("message_delta", delta={"stop_reason": "end_turn"}, usage=self._usage())
        yield 0, self._event("message_stop") + b"data: [DONE]\n\n"

    def _event(self, name: str, **data: Any) -> bytes:
        return event({"type": name, **data}, self._script, name)

    def _head(self) -> dict[str, Any]:
        return {"id": "msg-1", "type": "message", "role": "assistant", "model": self._body.get("model")}

    def _usage(self) -> dict[str, Any]:
        usage = {"input_tokens": self.prompt - self.cached, "output_tokens": self.written}
        known = self._script.cached_tokens is not None
        return usage | ({"cache_read_input_tokens": self.cached} if known else {})


class Response:
    """Of OpenAI's responses."""

    def __init__(self, body: dict[str, Any], text: str, script: Script) -> None:
        self._body, self._script = body, script
        self._id = f"resp_{next(_numbers):016x}"
        pieces = pieces_of(text)
        self._tokens = pieces[: body.get("max_output_tokens") or len(pieces)]
        self.prompt = len(_words([body.get("instructions"), body.get("input")]))
        self.cached = min(script.cached_tokens or 0, self.prompt)
        self.written = len(self._tokens)

    def whole(self) -> dict[str, Any]:
        said = {"type": "output_text", "text": "".join(self._tokens), "annotations": []}
        message = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
        usage = {
            "input_tokens": self.prompt,
            "input_tokens_details": {"cached_tokens": self.cached},
            "output_tokens": self.written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt + self.written,
        }
        return {**self._head("completed"), "output": [message | {"content": [said]}], "usage": usage}

    def events(self) -> Iterator[tuple[int, bytes]]:
        begun = {**self._head("in_progress"), "output": [], "usage": None}
        yield 0, self._event("response.created", response=begun)
        yield 0, self._event("response.in_progress", response=begun)
        for token in self._tokens:
            yield 1, self._event("response.output_text.delta", item_id="msg_1", delta=token)
        yield 0, self._event("response.output_text.done", item_id="msg_1", text="".join(self._tokens))
        yield 0, self._event("response.completed", response=self.whole())

    def _event(self, name: str, **data: Any) -> bytes:
        return event({"type": name, **data}, self._script, name)

    def _head(self, status: str) -> dict[str, Any]:
        model = self._body.get("model")
        return {"id": self._id, "object": "response", "created_at": 1, "status": status, "model": model}


def event(data: dict[str, Any], script: Script, name: str = "") -> bytes:
    named = f"event: {name}\n" if name else ""
    return f"{named}data: {encoded(data, script)}\n\n".encode()


def encoded(data: Any, script: Script) -> str:
    return json.dumps(data, separators=None if script.spaces else (",", ":"))


def pieces_of(text: str) -> list[str]:
    """The tokens of a text."""
    return [word if index == 0 else " " + word for index, word in enumerate(text.split(" "))]


def prompts_of(body: dict[str, Any]) -> list[list[str]]:
    """The tokens of each prompt of a request for completions."""
    prompt = body.get("messages") or body.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        return [_words(one) for one in prompt]
    return [_words(prompt)]


def score(body: dict[str, Any], disputes: str) -> dict[str, Any]:
    """As vLLM answers a request with ``prompt_logprobs``: the prompt's tokens, then those of the answer."""
    messages = body["messages"]
    prompt = _words(messages[:-1])
    said = pieces_of(messages[-1]["content"])
    rows = [None, *({"1": _row(token, False)} for token in prompt[1:])]
    for number, token in enumerate(said):
        unlikely = any(letter in token for letter in disputes)
        row = {str(number + 2): _row(token, unlikely)}
        rows.append({**row, "1": {"logprob": -0.01, "rank": 1, "decoded_token": "x"}} if unlikely else row)
    return {"choices": [], "prompt_logprobs": rows}


def _words(prompt: Any) -> list[str]:
    return json.dumps(prompt).split()


def _counts(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _row(token: str, unlikely: bool) -> dict[str, Any]:
    logprob, rank = (-12.0, 900) if unlikely else (math.log(TOKEN_P), 1)
    return {"logprob": logprob, "rank": rank, "decoded_token": token}


def _logprob(token: str, k: int) -> dict[str, Any]:
    rest = (1 - TOKEN_P) / 2 / max(1, k - 1)
    others = [{"token": f"alt{i}", "logprob": math.log(rest), "bytes": None} for i in range(1, k)]
    chosen = {"token": token, "logprob": math.log(TOKEN_P), "bytes": list(token.encode())}
    return {**chosen, "top_logprobs": [chosen, *others] if k else []}
