"""An answer put together again from what passed by, whether it was streamed or not."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from gateway.quality.signals import SignalMeter


class Answer:
    """The text of each choice, the usage, the signals, and when its parts arrived.

    Usage is the engine's own count. A stream that broke off has the count of its last chunk, since
    engines are asked for it with every chunk; a provider that gives none leaves ``prompt_tokens`` None.
    """

    def __init__(self) -> None:
        self.prompt_tokens: int | None = None
        self.completion_tokens = 0
        self.first_token_at: float | None = None
        self.gaps_s: list[float] = []
        self._last_at = 0.0
        self._texts: defaultdict[int, list[str]] = defaultdict(list)
        self._calls: dict[tuple[int, int], list[str]] = {}
        """Choice and number of a tool call to its name and the parts of its arguments."""
        self.finish_reasons: list[str] = []
        self.reasoned = False
        self.tokens: list[tuple[str, float]] = []
        """The first choice's tokens with their log-probabilities, nats, as far as the engine gave them."""
        self.meter = SignalMeter()

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

    def add(self, data: dict[str, Any], at: float) -> None:
        """Take in one event of the engine that arrived at ``at`` (seconds of the gateway's clock)."""
        usage = data.get("usage")
        if isinstance(usage, dict):
            self.prompt_tokens = max(0, int(usage.get("prompt_tokens") or 0))
            self.completion_tokens = max(0, int(usage.get("completion_tokens") or 0))
        grew = [self._add_choice(choice) for choice in data.get("choices") or ()]
        if not any(grew):
            return
        if self.first_token_at is None:
            self.first_token_at = at
        else:
            self.gaps_s.append(at - self._last_at)
        self._last_at = at
        if not isinstance(usage, dict):
            self.completion_tokens += sum(grew)

    def _add_choice(self, choice: dict[str, Any]) -> int:
        """Tokens that the choice grew by: counted by log-probabilities where there are any, else one."""
        part = choice.get("delta") or choice.get("message") or {}
        text = part.get("content") or choice.get("text") or ""
        index = choice.get("index", 0)
        if text:
            self._texts[index].append(text)
        for place, call in enumerate(part.get("tool_calls") or ()):
            function = call.get("function") or {}
            known = self._calls.setdefault((index, call.get("index", place)), [""])
            known[0] += function.get("name") or ""
            known.append(function.get("arguments") or "")
        if reason := choice.get("finish_reason"):
            self.finish_reasons.append(reason)
        logprobs = choice.get("logprobs")
        content = logprobs.get("content") if isinstance(logprobs, dict) else None
        for token in content or ():
            self.meter.add(token)
            if index == 0:
                self.tokens.append((token["token"], float(token["logprob"])))
        thought = part.get("reasoning") or part.get("reasoning_content")
        self.reasoned = self.reasoned or bool(thought)
        return len(content or ()) or int(bool(text or thought or part.get("tool_calls")))
