"""Independent pieces of work side by side, a core each.

Torch splits every operation over all cores and waits for the slowest; where cores are shared with other
processes, an operation of a millisecond then takes a time slice. Pieces that each stay on one core do not
wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

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
