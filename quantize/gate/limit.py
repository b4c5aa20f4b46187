"""One limit of a budget as a test, and the words that its tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LimitTest:
    """One limit: what was found, and how probable that is where the limit is broken."""

    p: float
    beyond: bool
    """The point estimate breaks the limit."""
    found: str
    needed: Callable[[float], str]
    """What would decide at a level of significance, in words."""


def missing(what: str, key: str, items: str) -> LimitTest:
    """A limit whose figures are not there."""
    fix = f"{key} needs {items}; give the role some, or leave it out"
    return LimitTest(1.0, False, f"{what}: not measured", lambda _level: fix)


def decides(what: str, more: int | None, units: str = "items") -> str:
    """How many items would decide, in words."""
    if more is None:
        return f"the {what} is at its limit: more {units} would hardly help"
    return f"about {more} {units} would decide the {what}"
