"""What the answers of all protocols are made of: tokens, events, log-probabilities."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

from gateway.upstream.fake.script import Call, Script

TOKEN_P = 0.9
"""Probability of every token that a fake engine says; each alternative has half of what is left."""
_numbers = itertools.count(1)


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
        return [words_of(one) for one in prompt]
    return [words_of(prompt)]


def score(body: dict[str, Any], disputes: str) -> dict[str, Any]:
    """As vLLM answers a request with ``prompt_logprobs``: the prompt's tokens, then those of the answer."""
    messages = body["messages"]
    prompt = words_of(messages[:-1])
    said = pieces_of(messages[-1]["content"])
    rows = [None, *({"1": _row(token, False)} for token in prompt[1:])]
    for number, token in enumerate(said):
        unlikely = any(letter in token for letter in disputes)
        row = {str(number + 2): _row(token, unlikely)}
        rows.append({**row, "1": {"logprob": -0.01, "rank": 1, "decoded_token": "x"}} if unlikely else row)
    return {"choices": [], "prompt_logprobs": rows}


def words_of(prompt: Any) -> list[str]:
    return json.dumps(prompt).split()


def counts(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _row(token: str, unlikely: bool) -> dict[str, Any]:
    logprob, rank = (-12.0, 900) if unlikely else (math.log(TOKEN_P), 1)
    return {"logprob": logprob, "rank": rank, "decoded_token": token}


def logprob(token: str, k: int) -> dict[str, Any]:
    left = 1 - TOKEN_P
    others = [{"token": f"alt{i}", "logprob": math.log(left / 2**i), "bytes": None} for i in range(1, k)]
    chosen = {"token": token, "logprob": math.log(TOKEN_P), "bytes": list(token.encode())}
    return {**chosen, "top_logprobs": [chosen, *others] if k else []}


def cut(arguments: str) -> list[str]:
    """The arguments of a call as a stream has them: in pieces that are no JSON of their own."""
    third = max(1, -(-len(arguments) // 3))
    return [arguments[start : start + third] for start in range(0, len(arguments), third)]


def named(calls: tuple[Call, ...], prefix: str) -> list[tuple[str, Call]]:
    """Each call of an answer with an id of its own."""
    return [(next_id(prefix), call) for call in calls]


def next_id(prefix: str) -> str:
    return f"{prefix}{next(_numbers):016x}"
