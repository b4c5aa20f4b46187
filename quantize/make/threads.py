"""Independent pieces of work side by side, a core each.

Torch splits every operation over all cores and waits for the slowest; where cores are shared with other
processes, an operation of a millisecond then takes a time slice. Pieces that each stay on one core do not
wait for each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(work: Callable[[T], R], pieces: Iterable[T]) -> list[R]:
    """``work`` of every piece, in order. Torch uses one core in each; afterwards as many as before."""
    import torch

    pieces = list(pieces)
    cores = torch.get_num_threads()
    if len(pieces) < 2 or cores < 2:
        return [work(piece) for piece in pieces]
    torch.set_num_threads(1)
    try:
        # Threads take over the number of cores that is set when they first use torch: so they are new.
        with ThreadPoolExecutor(cores) as pool:
            return list(pool.map(work, pieces))
    finally:
        torch.set_num_threads(cores)


def each_on(device: torch.device, work: Callable[[T], R], pieces: Iterable[T]) -> list[R]:
    """``work`` of every piece, in order: side by side on a processor. An accelerator takes one after the
    other whoever asks, and pieces side by side would only take more of its memory."""
    return side_by_side(work, pieces) if device.type == "cpu" else list(map(work, pieces))


class InOrder:
    """Lets pieces of work that run side by side add to the same sums in the order of their numbers.

    The order of a sum of floating-point numbers decides its last bits: added as threads come, the same inputs
    would make other variants. A piece waits for those before it alone, which have begun before it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._finished: set[int] = set()
        self._added: dict[str, set[int]] = {}

    @contextmanager
    def turn(self, name: str, number: int) -> Iterator[None]:
        """Alone, and after all pieces of a smaller ``number`` have added to ``name`` or are finished."""
        with self._changed:
            added = self._added.setdefault(name, set())
            self._changed.wait_for(lambda: all(n in added or n in self._finished for n in range(number)))
            yield
            added.add(number)
            self._changed.notify_all()

    @contextmanager
    def piece(self, number: int) -> Iterator[None]:
        """Around all that a piece does: whatever becomes of it, nobody waits for it afterwards."""
        try:
            yield
        finally:
            with self._changed:
                self._finished.add(number)
                self._changed.notify_all()
