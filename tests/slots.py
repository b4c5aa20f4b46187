"""Engines at once: no more than three on a machine, however many workers run tests.

A file of tests says with ``pytest.mark.engine(2)`` that two engines run at once in it; one is what is taken
for it otherwise. What a file needs is taken before its first test and given back after its last, all at once
and in turn, so that no worker waits with what another one waits for.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

AT_ONCE = 3
STACK = "stack"
"""The group of tests that share the session's stack, which is all engines that may run."""


def group_of(item: pytest.Item) -> str:
    """Tests that one worker runs one after another: a file's, or those of the session's stack."""
    file = item.nodeid.partition("::")[0]
    whole = file.startswith("tests/e2e/") and STACK in getattr(item, "fixturenames", ())
    return STACK if whole else file


def engines_of(item: pytest.Item) -> int:
    """How many engines run at once while the item does."""
    if (mark := item.get_closest_marker("engine")) is None:
        return 0
    return AT_ONCE if group_of(item) == STACK else int(mark.args[0]) if mark.args else 1


class Slots:
    """A worker's share of the engines that may run at once; files in ``directory`` that it locks, which is
    that of all workers of a run."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._held: list[IO[bytes]] = []
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def held(self) -> int:
        return len(self._held)

    def take(self, count: int) -> None:
        """Wait for ``count`` slots. Nothing may be held."""
        assert not self._held
        with self._turn():
            while True:
                self._held = self._free(count)
                if len(self._held) == count:
                    return
                self.give_back()
                time.sleep(0.1)

    def give_back(self) -> None:
        while self._held:
            self._held.pop().close()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Whoever waits for many is not overtaken by who wants few."""
        with (self._directory / "turn").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _free(self, most: int) -> list[IO[bytes]]:
        found: list[IO[bytes]] = []
        for number in range(AT_ONCE):
            if len(found) == most:
                break
            file = (self._directory / str(number)).open("wb")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
            else:
                found.append(file)
        return found
