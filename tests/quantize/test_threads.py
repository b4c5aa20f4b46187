"""Sums of pieces that run side by side are the same every time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from quantize.make.threads import InOrder


def test_pieces_add_in_their_order_however_they_come() -> None:
    order, added = InOrder(), list[int]()
    last_is_there = threading.Event()

    def work(number: int) -> None:
        with order.piece(number):
            if number == 3:
                last_is_there.set()
            last_is_there.wait(60)
            if number != 1:  # it has nothing to add
                with order.turn("x", number):
                    added.append(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert added == [0, 2, 3]


def test_nobody_waits_for_a_piece_that_failed() -> None:
    order, added = InOrder(), list[int]()

    def work(number: int) -> None:
        with order.piece(number):
            if number == 0:
                raise RuntimeError("memory ran out")
            with order.turn("x", number):
                added.append(number)

    with ThreadPoolExecutor(2) as pool:
        failed, other = pool.submit(work, 0), pool.submit(work, 1)
        other.result(60)
        with pytest.raises(RuntimeError, match="memory ran out"):
            failed.result(60)
    assert added == [1]
