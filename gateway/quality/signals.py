"""Signals from log-probabilities: cheap, always there, and no verdict.

They see a model that becomes unsure, and miss one that is wrong with confidence; so they serve to
notice drift between variants and over time. All in nats. An engine gives the k likeliest tokens per
position only, and before temperature is applied (vLLM's ``raw_logprobs``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

UNLIKELY = 0.1
"""A token below this probability counts as unlikely."""

_MINUS_INFINITY = -9999.0
"""What vLLM writes for the logarithm of zero."""


@dataclass(frozen=True)
class Signals:
    """Over the ``tokens`` of one answer: mean -log p, the highest entropy, the share of unlikely ones."""

    tokens: int
    nll_mean: float
    entropy_max: float
    unlikely_share: float


def entropy(logprobs: Iterable[float]) -> float:
    """Entropy of a position, in nats, from the log-probabilities of some of its tokens.

    What those leave of the probability counts as one more outcome. Merging outcomes only lowers
    entropy, so this is a lower bound of the entropy over the vocabulary.
    """
    probabilities = [math.exp(value) for value in logprobs if value > _MINUS_INFINITY]
    rest = 1.0 - sum(probabilities)
    if rest > 1e-9:
        probabilities.append(rest)
    return -sum(p * math.log(p) for p in probabilities if 0 < p < 1)


class SignalMeter:
    """Adds up the signals of an answer as it arrives, in constant memory."""

    def __init__(self) -> None:
        self._tokens = 0
        self._nll = 0.0
        self._entropy = 0.0
        self._unlikely = 0

    def add(self, token: Mapping[str, Any]) -> None:
        """One element of ``choices[].logprobs.content``."""
        chosen = float(token["logprob"])
        if not math.isfinite(chosen) or chosen <= _MINUS_INFINITY:
            return
        likeliest = token.get("top_logprobs") or ()
        logprobs = [float(other["logprob"]) for other in likeliest]
        if not any(other.get("token") == token.get("token") for other in likeliest):
            logprobs.append(chosen)
        self._tokens += 1
        self._nll -= chosen
        self._entropy = max(self._entropy, entropy(logprobs))
        self._unlikely += math.exp(chosen) < UNLIKELY

    def result(self) -> Signals | None:
        """None when the answer came without log-probabilities."""
        if not self._tokens:
            return None
        n = self._tokens
        return Signals(n, max(0.0, self._nll / n), self._entropy, self._unlikely / n)


def measure(tokens: Iterable[Mapping[str, Any]]) -> Signals | None:
    """Signals of a whole answer, from its ``choices[].logprobs.content``."""
    meter = SignalMeter()
    for token in tokens:
        meter.add(token)
    return meter.result()
