"""Engines at once, over several workers."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.slots import AT_ONCE, Slots


def test_no_more_are_held_than_may_run(tmp_path: Path) -> None:
    """Workers that take and give back, many times: what they hold together stays within what may run, and
    whoever wants all gets them."""
    held, most, done = [0] * 4, [0], [0] * 4
    lock = threading.Lock()

    def worker(number: int, count: int) -> None:
        slots = Slots(tmp_path)
        for _ in range(15):
            slots.take(count)
            with lock:
                held[number] = slots.held
                most[0] = max(most[0], sum(held))
            with lock:
                held[number] = 0
            slots.give_back()
            done[number] += 1

    threads = [threading.Thread(target=worker, args=pair) for pair in enumerate((1, 2, 3, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [15] * 4
    assert most[0] <= AT_ONCE


def test_a_worker_that_ends_gives_back_what_it_held(tmp_path: Path) -> None:
    one = Slots(tmp_path)
    one.take(AT_ONCE)
    assert one.held == AT_ONCE
    one.give_back()
    other = Slots(tmp_path)
    other.take(2)
    assert other.held == 2
    other.give_back()
    assert other.held == 0


def test_nothing_is_taken_beside_what_is_held(tmp_path: Path) -> None:
    one = Slots(tmp_path)
    one.take(1)
    with pytest.raises(AssertionError):
        one.take(1)
    one.give_back()
