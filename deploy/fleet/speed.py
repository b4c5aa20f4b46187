"""How long an engine's steps take, by what was measured of it.

An engine goes on in steps. One that writes a token of each of n answers, whose contexts have c tokens
together, and computes prompts of P tokens besides, takes ``s0 + s1 n + s2 c + p0 P + p1 (sum of their
squares)`` seconds: weights are read once for all (s0), caches by each (s2), and the square is the prompts'
attention. The law is fitted to the points on a card (:class:`quantize.card.SpeedPoint`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantize.card import Card
from quantize.core.engine_figures import SpeedPoint

STEP_TOKENS = 2048
"""In one step at most (vLLM's ``max_num_batched_tokens``; large GPUs have 8,192, which changes little)."""


class NoSpeedError(ValueError):
    """A variant's speed was not measured. The text says the fix."""


@dataclass(frozen=True)
class EngineSpeed:
    """The law's coefficients, seconds."""

    step: float
    answer: float
    """Per token that is written."""
    context: float
    """Per token in the cache of those answers."""
    prompt: float
    """Per prompt token that is computed."""
    prompt_square: float

    def step_s(self, answers: int, contexts: float) -> float:
        """Seconds of a step that writes a token of each of so many answers, of ``contexts`` tokens in all."""
        return self.step + self.answer * answers + self.context * contexts

    def prompt_s(self, tokens: float, cached: float = 0.0) -> float:
        """Seconds that so many prompt tokens add to a step, after ``cached`` tokens of the same prompt."""
        return self.prompt * tokens + self.prompt_square * ((cached + tokens) ** 2 - cached**2)


def speed_of(card: Card) -> EngineSpeed:
    """The law fitted to a card's points. Raises NoSpeedError."""
    if card.speed is None or not card.speed.points:
        raise NoSpeedError(
            f"{card.model}:{card.variant}: its speed was not measured at several loads; run "
            f"`tiercel quantize measure {card.variant}`"
        )
    return fit(card.speed.points)


def fit(points: Sequence[SpeedPoint]) -> EngineSpeed:
    """Coefficients that are not negative, by least squares of relative errors."""
    import numpy as np
    from scipy.optimize import nnls  # takes longer to import than the command line

    rows, seconds = [], []
    for point in points:
        n, prompt = point.together, point.prompt_tokens
        steps = math.ceil(n * prompt / STEP_TOKENS)
        rows += [
            [steps, 0.0, 0.0, n * prompt, n * float(prompt) ** 2],
            [1.0, n, n * (prompt + point.answer_tokens / 2), 0.0, 0.0],
        ]
        seconds += [point.prompt_s, point.step_s]
    table, aims = np.array(rows), np.array(seconds)
    scale = table.max(axis=0)
    found, _ = nnls(table / scale / aims[:, None], np.ones(len(aims)))
    return EngineSpeed(*(float(value) for value in found / scale))
