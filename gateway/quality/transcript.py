"""What an answer says: its texts, tool calls, tokens and signals, put together from its events.

An engine may send what nobody has seen before: what is not understood is left out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from gateway.quality.signals import SignalMeter, Signals

_DONE = b"[DONE]"


class Transcript:
    """An answer put together again, whether it was streamed or not."""

    def __init__(self) -> None:
        self._texts: defaultdict[int, list[str]] = defaultdict(list)
        self._calls: dict[tuple[int, int], list[str]] = {}
        """Choice and number of a tool call to its name and the parts of its arguments."""
        self.finish_reasons: list[str] = []
        self.reasoned = False
        self.tokens: list[tuple[str, float]] = []
        """The first choice's tokens with their log-probabilities, nats, as far as the engine gave them."""
        self._meter = SignalMeter()

    @classmethod
    def of(cls, events: Iterable[bytes]) -> Transcript:
        """Of events as they came, or of the whole of an answer that was not streamed."""
        made = cls()
        for raw in events:
            if (data := read_event(raw)) is not None:
                made.add(data)
        return made

    @property
    def texts(self) -> list[str]:
        """The text of every choice, in order of index."""
        return ["".join(self._texts[index]) for index in sorted(self._texts)]

    @property
    def tool_calls(self) -> list[tuple[str, str]]:
        """Name and arguments (JSON text) of every call, in order."""
        return [(name, "".join(parts)) for name, *parts in self._calls.values()]

    @property
    def cut_short(self) -> bool:
        """A choice ended at the limit on its length."""
        return "length" in self.finish_reasons

    @property
    def signals(self) -> Signals | None:
        """None when the answer came without log-probabilities."""
        return self._meter.result()

    @property
    def message(self) -> dict[str, Any]:
        """Its first choice, as an engine would have sent it whole."""
        calls = [{"function": {"name": name, "arguments": said}} for name, said in self.tool_calls]
        return {"content": self.texts[0] if self._texts else "", "tool_calls": calls}

    def add(self, data: Mapping[str, Any]) -> None:
        """Take in one event of the engine, decoded."""
        choices = data.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                self._add_choice(choice)

    def _add_choice(self, choice: Mapping[str, Any]) -> None:
        part = choice.get("delta") or choice.get("message")
        part = part if isinstance(part, dict) else {}
        text = part.get("content") or choice.get("text")
        index = choice.get("index", 0)
        index = index if isinstance(index, int) else 0
        if text and isinstance(text, str):
            self._texts[index].append(text)
        calls = part.get("tool_calls")
        for place, call in enumerate(calls if isinstance(calls, list) else ()):
            if isinstance(call, dict):
                self._add_call(index, place, call)
        if isinstance(reason := choice.get("finish_reason"), str):
            self.finish_reasons.append(reason)
        logprobs = choice.get("logprobs")
        content = logprobs.get("content") if isinstance(logprobs, dict) else None
        for token in content if isinstance(content, list) else ():
            self._add_token(index, token)
        self.reasoned = self.reasoned or bool(part.get("reasoning") or part.get("reasoning_content"))

    def _add_call(self, index: int, place: int, call: Mapping[str, Any]) -> None:
        function = call.get("function")
        function = function if isinstance(function, dict) else {}
        number = call.get("index", place)
        known = self._calls.setdefault((index, number if isinstance(number, int) else place), [""])
        known[0] += str(function.get("name") or "")
        arguments = function.get("arguments")
        known.append(arguments if isinstance(arguments, str) else "")

    def _add_token(self, index: int, token: Any) -> None:
        try:
            self._meter.add(token)
            if index == 0:
                self.tokens.append((str(token["token"]), float(token["logprob"])))
        except (AttributeError, ArithmeticError, KeyError, TypeError, ValueError):
            return


def read_event(raw: bytes) -> dict[str, Any] | None:
    """The JSON object of a server-sent event, or of a whole answer; None where there is none."""
    text = raw.strip()
    if not text.startswith(b"{"):
        text = b"\n".join(line[5:].strip() for line in raw.splitlines() if line.startswith(b"data:"))
        if not text or text == _DONE:
            return None
    return read_object(text)


def read_object(raw: bytes) -> dict[str, Any] | None:
    """A JSON object; None for what is none."""
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        found = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, RecursionError):
        try:
            found = json.loads(raw)
        except (ValueError, RecursionError):
            return None
    return found if isinstance(found, dict) else None
