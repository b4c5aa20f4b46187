"""A quantized answer put before the reference, after the client has it.

The reference reads the conversation and the answer in one prefill (``prompt_logprobs``) and writes nothing. A
token is disputed when the reference holds it unlikely (below a tenth of its own favourite) and the variant
held it more than three times as likely: noise between two near ties is not, and the reference itself,
whatever the temperature, disputes none of its own tokens. Where that raises suspicion, the reference answers
the question again, and the two answers are compared: that needs nothing of what the variant said about
itself.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.quality.claims import extract
from gateway.quality.records import Result

UNLIKELY = math.log(0.1)
"""Log-ratio to the reference's favourite token below which a token is unlikely to it."""
MORE_LIKELY = math.log(3.0)
"""Log-ratio of the variant's probability to the reference's above which the variant stands alone."""
DISPUTED_SHARE = 0.02
"""Share of an answer's tokens that must be disputed, and at least one."""
LEAST_ALIKE = 0.5
"""Share of words (F1) that two texts have in common when they say about the same."""
APART = 0.5
"""Nats per token by which the variant must hold its text likelier than the reference does, where the two cut
it into other tokens, so that only whole texts can be compared: what nobody would write is cut in odd ways."""
LABEL_WORDS = 6
"""An answer of so many words or fewer is a label, which is right or wrong as a whole."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Scored:
    """``divergence``: mean of log q - log p over the answer's tokens, nats: for an answer sampled at
    temperature 1 an estimate of the KL divergence. ``disagreement``: share of tokens that are not the
    reference's favourite."""

    tokens: int
    disputed: int
    divergence: float
    disagreement: float

    @property
    def result(self) -> Result:
        least = max(1, math.ceil(DISPUTED_SHARE * self.tokens))
        return Result.DISPUTED if self.disputed >= least else Result.AGREED


Row = Mapping[str, Mapping[str, Any]]
"""What ``prompt_logprobs`` says of one token: id to log-probability, rank and text; the token itself and the
favourite, which may be the same."""


def compare(said: Sequence[tuple[str, float]], rows: Sequence[Row | None]) -> Scored | None:
    """``said``: the answer's tokens with the variant's log-probabilities; ``rows``: the reference's of the
    same. An end token that only the variant names is left out. None when they cannot be put side by side."""
    if len(said) == len(rows) + 1:
        said = said[:-1]
    if not said or not rows:
        return None
    theirs: list[tuple[float, float, bool]] = []
    for row in rows:
        if not row:
            return None
        entries = sorted(row.values(), key=lambda entry: int(entry["rank"]))
        token, favourite = float(entries[-1]["logprob"]), float(entries[0]["logprob"])
        theirs.append((max(-50.0, token), favourite, int(entries[-1]["rank"]) > 1))
    mine = [max(-50.0, logprob) for _, logprob in said]
    divergence = (sum(mine) - sum(token for token, _, _ in theirs)) / len(theirs)
    other = sum(differs for _, _, differs in theirs) / len(theirs)
    if len(mine) != len(theirs):
        return Scored(len(theirs), len(theirs) if divergence > APART else 0, divergence, other)
    disputed = sum(
        token - favourite < UNLIKELY and ours - token > MORE_LIKELY
        for ours, (token, favourite, _) in zip(mine, theirs, strict=True)
    )
    return Scored(len(theirs), disputed, divergence, other)


def same_meaning(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether two assistant messages say the same: calls and JSON by their values, labels word by word,
    prose by its figures and half of its words."""
    calls, other_calls = _calls(mine), _calls(theirs)
    if calls or other_calls:
        return calls == other_calls
    text, other = str(mine.get("content") or "").strip(), str(theirs.get("content") or "").strip()
    if text == other:
        return True
    try:
        return bool(json.loads(text) == json.loads(other))
    except (ValueError, RecursionError):
        pass
    words, others = (_WORD.findall(one.lower()) for one in (text, other))
    if min(len(words), len(others)) <= LABEL_WORDS:
        return words == others
    if _figures(text) != _figures(other):
        return False
    common = sum((Counter(words) & Counter(others)).values())
    return 2 * common >= LEAST_ALIKE * (len(words) + len(others))


def _calls(message: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        try:
            arguments = json.loads(function.get("arguments") or "{}")
        except (ValueError, RecursionError):
            arguments = function.get("arguments")
        found.append((str(function.get("name")), arguments))
    return found


def _figures(text: str) -> set[tuple[str, ...]]:
    return {claim.value for claim in extract(text)[0]}
