"""How long an engine takes for what it is asked, by what was measured of it.

Two laws, fitted to the points on a card (:class:`quantize.card.SpeedPoint`):

- a prompt of P new tokens takes ``p0 P + p1 P^2`` seconds (the square is attention);
- a step that writes one token of each of n answers, with c tokens of context each, takes
  ``s0 + s1 n + s2 n c`` seconds (weights are read once for all, caches by each).

An engine that has n such requests at a time finishes one every ``prompt + A step(n) / n`` seconds: prompts
are computed one after the other, steps serve all at once (continuous batching).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from quantize.card import Card, SpeedPoint


class NoSpeedError(ValueError):
    """A variant's speed was not measured. The text says the fix."""


@dataclass(frozen=True)
class EngineSpeed:
    """The coefficients of the module's two laws, seconds."""

    prompt: tuple[float, float]
    step: tuple[float, float, float]

    def prompt_s(self, tokens: float) -> float:
        """Seconds to compute so many new prompt tokens of one request."""
        return self.prompt[0] * tokens + self.prompt[1] * tokens**2

    def step_s(self, together: float, context: float) -> float:
        """Seconds in which each of ``together`` answers gets one more token."""
        return self.step[0] + self.step[1] * together + self.step[2] * together * context

    def request_s(self, new_tokens: float, answer_tokens: float, context: float, together: float) -> float:
        """Seconds of the engine that one request takes, where ``together`` of them share it."""
        share = answer_tokens * self.step_s(max(1.0, together), context) / max(1.0, together)
        return self.prompt_s(new_tokens) + share


def speed_of(card: Card) -> EngineSpeed:
    """The laws fitted to a card's points. Raises NoSpeedError."""
    if card.speed is None or not card.speed.points:
        raise NoSpeedError(
            f"{card.model}:{card.variant}: its speed was not measured at several loads; run "
            f"`tiercel quantize measure {card.variant}`"
        )
    return fit(card.speed.points)


def fit(points: Sequence[SpeedPoint]) -> EngineSpeed:
    """Coefficients that are not negative, by least squares of relative errors."""
    prompts = np.array([[p.prompt_tokens, float(p.prompt_tokens) ** 2] for p in points])
    steps = np.array(
        [[1.0, p.together, p.together * (p.prompt_tokens + p.answer_tokens / 2)] for p in points]
    )
    p0, p1 = _fit(prompts, [p.prompt_s / p.together for p in points])
    s0, s1, s2 = _fit(steps, [p.step_s for p in points])
    return EngineSpeed((p0, p1), (s0, s1, s2))


def _fit(rows: np.ndarray, seconds: Sequence[float]) -> list[float]:
    aims = np.array(seconds)
    scale = rows.max(axis=0)
    found, _ = nnls(rows / scale / aims[:, None], np.ones(len(aims)))
    return [float(value) for value in found / scale]
