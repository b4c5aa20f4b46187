"""The next token of a row of logits, and the log-probabilities that are told of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from quantize.export.llama import GrammarError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quantize.export.llama import Grammar

LEAST_TEMPERATURE = 1e-5
"""Below it the likeliest token is taken, as in vLLM."""
TRIED = (1, 64)
"""Likeliest tokens that a grammar is asked about, before it is asked about all."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, with the names and meanings of OpenAI's and vLLM's fields."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    """Likeliest tokens that are told of each place; -1 is all of them, None none and not the chosen one's."""
    ignore_eos: bool = False
    min_tokens: int = 0

    def nth(self, number: int) -> Sampling:
        """Of the answer of that number to one request: with one seed alone all of them would be the same
        (vLLM counts on from it as well)."""
        return self if self.seed is None else replace(self, seed=self.seed + number)


class Drawn(NamedTuple):
    """A token, its natural-log probability by the unchanged logits, and the likeliest with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Draws one answer's tokens. ``prompt`` counts for the repetition penalty, as in vLLM."""

    def __init__(self, how: Sampling, prompt: list[int], ends: list[int], grammar: Grammar | None) -> None:
        """``ends`` are the tokens that end an answer."""
        self._how, self._ends, self._grammar = how, ends, grammar
        self._random = np.random.default_rng(how.seed)
        self._counts: dict[int, int] = {}
        self._seen = set(prompt) if how.repetition_penalty != 1.0 else set[int]()
        self._written = 0
        self._greedy = how.temperature < LEAST_TEMPERATURE

    def draw(self, logits: NDArray[np.float32]) -> Drawn:
        """The next token of ``logits`` (vocabulary,)."""
        how = self._how
        changed = self._changed(logits)
        if self._grammar is not None:
            changed = self._guided(self._grammar, changed)
        token = int(changed.argmax()) if self._greedy else self._random_token(changed)
        if self._grammar is not None:
            self._grammar.accept(token)
        self._counts[token] = self._counts.get(token, 0) + 1
        self._written += 1
        if how.logprobs is None:
            return Drawn(token, 0.0, ())
        known = log_softmax(logits)
        most = len(known) if how.logprobs < 0 else min(how.logprobs, len(known))
        ids = np.argsort(-known, kind="stable")[:most] if most else ()
        return Drawn(token, float(known[token]), tuple((int(one), float(known[one])) for one in ids))

    def _changed(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        how = self._how
        held_back = how.ignore_eos or self._written < how.min_tokens
        penalties = how.presence_penalty or how.frequency_penalty or how.repetition_penalty != 1.0
        if not (held_back or penalties or how.logit_bias):
            return logits
        found = logits.copy()
        if how.repetition_penalty != 1.0:
            ids = np.fromiter(self._seen | self._counts.keys(), np.int64)
            values = found[ids]
            factor = np.float32(how.repetition_penalty)
            found[ids] = np.where(values > 0, values / factor, values * factor)
        for token, count in self._counts.items():
            found[token] -= how.frequency_penalty * count + how.presence_penalty
        for token, bias in how.logit_bias.items():
            found[token] += bias
        if held_back:
            found[self._ends] = -np.inf
        return found

    def _guided(self, grammar: Grammar, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of the tokens that the grammar allows; greedy choices are mostly among the likeliest."""
        if self._greedy:
            for most in TRIED:
                ids = np.argpartition(-logits, most - 1)[:most]
                allowed = ids[grammar.allowed(ids.tolist())]
                if len(allowed):
                    return _only(logits, allowed)
        ids = np.flatnonzero(np.isfinite(logits))
        allowed = ids[grammar.allowed(ids.tolist())]
        if not len(allowed):
            raise GrammarError("its grammar leaves no token that the model knows")
        return _only(logits, allowed)

    def _random_token(self, logits: NDArray[np.float32]) -> int:
        how = self._how
        values = logits.astype(np.float64) / how.temperature
        order = np.argsort(-values, kind="stable")
        if how.top_k > 0:
            order = order[: how.top_k]
        chances = np.exp(values[order] - values[order[0]])
        chances /= chances.sum()
        kept = np.ones(len(order), bool)
        if how.top_p < 1:
            kept &= np.cumsum(chances) - chances < how.top_p
        if how.min_p > 0:
            kept &= chances >= how.min_p * chances[0]
        order, chances = order[kept], chances[kept] / chances[kept].sum()
        # By their ids: of neighbours in likelihood the order changes with what is decoded beside them.
        places = np.argsort(order)
        return int(self._random.choice(order[places], p=chances[places]))


def _only(logits: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.float32]:
    found = np.full_like(logits, -np.inf)
    found[ids] = logits[ids]
    return found


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural-log probabilities, float64, over the last axis."""
    values = logits.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    found: NDArray[np.float64] = values - np.log(np.exp(values).sum(-1, keepdims=True))
    return found
