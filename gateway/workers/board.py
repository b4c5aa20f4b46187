"""Requests in flight of all workers, in a file that they map into memory."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SLOTS = 1 << 14
"""Replicas that the board has room for at a time."""
NO_SLOT = -1
"""The place of a replica for which there was no room: its requests are counted by each worker for itself."""
_DIGEST = 16
_MOST_USES = 255


class Board:
    """A row per worker, a column per replica. Each worker writes its own row alone.

    The file begins with the digest of each column's replica. A worker that has use for a column says so in
    a row of bytes; what no worker has use for is given to another replica. Only that needs the lock.
    """

    def __init__(self, path: Path, worker: int, workers: int) -> None:
        """Clears the worker's own row: one that begins has nothing in flight."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        size = SLOTS * (_DIGEST + 4 * workers + workers)
        os.ftruncate(self._descriptor, size)
        self._map = mmap.mmap(self._descriptor, size)
        whole = memoryview(self._map)
        counts, uses = SLOTS * _DIGEST, SLOTS * (_DIGEST + 4 * workers)
        self._digests = whole[:counts]
        self._cells = whole[counts:uses].cast("i")
        self._uses = [whole[uses + SLOTS * one : uses + SLOTS * (one + 1)] for one in range(workers)]
        self._worker = worker
        self._row = SLOTS * worker
        self._others = [SLOTS * other for other in range(workers) if other != worker]
        self._lock = threading.RLock()
        """For the threads of this process: a replica may be forgotten in any of them."""
        self.clear()

    def slot(self, variant: str, url: str) -> int:
        """The column of a replica, the same for all workers, until ``free`` is called as often; NO_SLOT when
        there is no room."""
        digest = hashlib.blake2b(f"{variant}\0{url}".encode(), digest_size=_DIGEST).digest()
        with self._lock, self._locked():
            slot = self._find(digest)
            mine = self._uses[self._worker]
            if slot == NO_SLOT and (slot := self._unused()) != NO_SLOT:
                self._digests[_DIGEST * slot : _DIGEST * (slot + 1)] = digest
            if slot != NO_SLOT:
                mine[slot] = min(mine[slot] + 1, _MOST_USES)
            return slot

    def free(self, slot: int) -> None:
        """A replica is forgotten."""
        with self._lock:
            mine = self._uses[self._worker]
            if slot != NO_SLOT and 0 < mine[slot] < _MOST_USES:
                if mine[slot] == 1:
                    self._cells[self._row + slot] = 0
                mine[slot] -= 1

    def write(self, slot: int, in_flight: int) -> None:
        if slot >= 0:
            self._cells[self._row + slot] = in_flight

    def others(self, slot: int) -> int:
        """Requests of all other workers."""
        if slot < 0:
            return 0
        cells = self._cells
        return sum([cells[row + slot] for row in self._others])

    def clear(self) -> None:
        """Nothing is in flight, and no column in use: what the parent does for a worker that has ended."""
        self._cells[self._row : self._row + SLOTS] = memoryview(bytes(4 * SLOTS)).cast("i")
        self._uses[self._worker][:] = bytes(SLOTS)

    def close(self) -> None:
        for view in (self._cells, self._digests, *self._uses):
            view.release()
        os.close(self._descriptor)

    def _find(self, digest: bytes) -> int:
        digests = bytes(self._digests)
        at = digests.find(digest)
        while at % _DIGEST and at >= 0:  # across two of them
            at = digests.find(digest, at + 1)
        return at // _DIGEST if at >= 0 else NO_SLOT

    def _unused(self) -> int:
        used = 0
        for row in self._uses:
            used |= int.from_bytes(row, "little")
        return used.to_bytes(SLOTS, "little").find(0)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
