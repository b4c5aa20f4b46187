"""One limit of a budget as a test, and the words that its tests share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from quantize.card import TextEvaluation

NOT_FINITE = 1e6
"""Nats a token that a card holds in the place of losses that are not finite, which JSON does not know: the
difference of log-perplexities is that where the variant's scores are not, its negative where the reference's
are not."""
MOST_NATS = 100.0
"""Nats a token that perplexities are of at most: a guess among all tokens of a vocabulary takes 13."""


@dataclass(frozen=True)
class LimitTest:
    """One limit: what was found, and how probable that is where the limit is broken."""

    p: float
    beyond: bool
    """The point estimate breaks the limit."""
    found: str
    needed: Callable[[float], str]
    """What would decide at a level of significance, in words."""

    def __post_init__(self) -> None:
        """What could not be computed is no evidence."""
        if math.isnan(self.p):
            object.__setattr__(self, "p", 1.0)


def missing(what: str, key: str, items: str) -> LimitTest:
    """A limit whose figures are not there."""
    fix = f"{key} needs {items}; give the role some, or leave it out"
    return LimitTest(1.0, False, f"{what}: not measured", lambda _level: fix)


def not_finite(text: TextEvaluation) -> LimitTest | None:
    """A limit that no budget need set: scores are numbers. None where they are. A variant whose engine gave
    others fails; where the reference's did there is no verdict."""
    if abs(text.delta_log_perplexity) < NOT_FINITE:
        return None
    of_variant = text.delta_log_perplexity > 0
    whose, model = ("its", "the variant") if of_variant else ("the reference's", "the reference")
    fix = f"{model} overflows, or its files are damaged: make it anew, or measure on another engine or device"
    said = f"{whose} engine answered with numbers that are not finite when it scored right answers"
    return LimitTest(1.0, of_variant, said, lambda _level: fix)


def decides(what: str, more: int | None, units: str = "items") -> str:
    """How many items would decide, in words."""
    if more is None:
        return f"the {what} is at its limit: more {units} would hardly help"
    return f"about {more} {units} would decide the {what}"
