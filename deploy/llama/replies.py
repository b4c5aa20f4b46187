"""What is answered: OpenAI's objects, from what the thread delivers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy.llama.sampling import Drawn
from deploy.llama.text import Text
from quantize.export.llama import LlamaModel


@dataclass
class Choice:
    """One answer as it grows."""

    index: int
    text: Text
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    content: str = ""
    finish: str | None = None
    offset: int = 0
    """Characters before the next token, for ``text_offset``."""

    def add(self, drawn: Drawn, piece: bytes) -> str:
        """The text that is certain now; ``finish`` is set where a stop string came."""
        self.tokens.append(drawn.token)
        self.drawn.append(drawn)
        more = self.text.add(piece)
        self.content += more
        if self.text.stopped:
            self.finish = "stop"
        return more

    def end(self, why: str) -> str:
        """The rest of the text."""
        more = "" if self.text.stopped else self.text.add(b"", last=True)
        self.content += more
        self.finish = self.finish or why
        return more


class Replies:
    """Objects of one request."""

    def __init__(self, model: LlamaModel, name: str, chat: bool, told: int | None, with_ids: bool) -> None:
        """``told`` is how many likeliest tokens are told, None where no log-probabilities are."""
        self._model, self._chat, self._told, self._with_ids = model, chat, told, with_ids
        kind = "chatcmpl" if chat else "cmpl"
        self._common: dict[str, Any] = {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": name,
        }

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        kind = "chat.completion" if self._chat else "text_completion"
        found = [self._entry(one, one.content, one.drawn, first=True) for one in choices]
        if self._chat:
            for one, entry in zip(choices, found, strict=True):
                entry["message"] = {"role": "assistant", "content": one.content}
                del entry["delta"]
        return {**self._common, "object": kind, "choices": found, "usage": usage(choices)}

    def first(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The chunk of a chat that says who speaks."""
        return self._chunk([{**self._empty(one), "delta": {"role": "assistant", "content": ""}}
                            for one in choices])  # fmt: skip

    def part(self, choice: Choice, text: str, drawn: Sequence[Drawn]) -> dict[str, Any]:
        """A chunk of one answer."""
        return self._chunk([self._entry(choice, text, drawn)])

    def last(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The chunk with the usage, which has no choices."""
        return {**self._chunk([]), "usage": usage(choices)}

    def _chunk(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._common, "object": kind, "choices": entries}

    def _empty(self, choice: Choice) -> dict[str, Any]:
        return {"index": choice.index, "logprobs": None, "finish_reason": None}

    def _entry(
        self, choice: Choice, text: str, drawn: Sequence[Drawn], first: bool = False
    ) -> dict[str, Any]:
        entry: dict[str, Any] = {**self._empty(choice), "finish_reason": choice.finish}
        entry |= {"delta": {"content": text}} if self._chat else {"text": text}
        if self._told is not None:
            entry["logprobs"] = self._of_chat(drawn) if self._chat else self._of_text(choice, drawn)
        if self._with_ids:
            entry["token_ids"] = choice.tokens if first else [one.token for one in drawn]
        return entry

    def _name(self, token: int) -> str:
        return self._model.piece(token, special=True).decode(errors="replace")

    def _of_chat(self, drawn: Sequence[Drawn]) -> dict[str, Any]:
        def shown(token: int, logprob: float) -> dict[str, Any]:
            raw = self._model.piece(token, special=True)
            return {
                "token": raw.decode(errors="replace"),
                "logprob": _told(logprob),
                "bytes": list(raw),
            }

        content = [
            {
                **shown(one.token, one.logprob),
                "top_logprobs": [shown(token, value) for token, value in one.top],
            }
            for one in drawn
        ]
        return {"content": content}

    def _of_text(self, choice: Choice, drawn: Sequence[Drawn]) -> dict[str, Any]:
        offsets = []
        for one in drawn:
            offsets.append(choice.offset)
            choice.offset += len(self._name(one.token))
        tops = [
            {self._name(token): _told(value) for token, value in (*one.top, (one.token, one.logprob))}
            for one in drawn
        ]
        return {
            "tokens": [self._name(one.token) for one in drawn],
            "token_logprobs": [_told(one.logprob) for one in drawn],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def _told(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, -9999.0)


def usage(choices: Sequence[Choice]) -> dict[str, int]:
    """Tokens of prompts and of answers. Of several answers to one prompt the first one counts its tokens."""
    read, written = sum(one.prompt_tokens for one in choices), sum(len(one.tokens) for one in choices)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
