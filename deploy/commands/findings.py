"""What ``tiercel doctor`` finds: a level, what is the case, and the fix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from gateway.config import Config, ModelConfig, parts_of


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    """It works, and something may hurt later."""
    FAILURE = "failure"
    """Something cannot work as it is."""


@dataclass(frozen=True)
class Finding:
    """One line. ``check`` is set by whoever runs the checks."""

    level: Level
    found: str
    fix: str = ""
    """A command, or a sentence where there is none."""
    check: str = ""


@dataclass(frozen=True)
class Subject:
    """What is examined."""

    path: Path
    config: Config

    def local(self) -> list[str]:
        """Variants whose engines are started here, as ``model:variant``."""
        return [variant for variant in self.config.served if variant not in self.config.pools]

    def of(self, variant: str) -> tuple[ModelConfig, str]:
        """The model of a ``model:variant``, and the variant's name within it."""
        model, short = parts_of(variant)
        return self.config.of(model), short


Findings = Iterator[Finding]
Check = Callable[[Subject], Findings]


def ok(found: str) -> Finding:
    return Finding(Level.OK, found)


def warning(found: str, fix: str) -> Finding:
    return Finding(Level.WARNING, found, fix)


def failure(found: str, fix: str) -> Finding:
    return Finding(Level.FAILURE, found, fix)
