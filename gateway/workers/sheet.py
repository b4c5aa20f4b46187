"""Every worker's counters, in files that all of them map into memory.

A worker writes its own sheet alone, and a worker that is started anew goes on where its predecessor was
killed: nothing that was counted is lost, and no sum falls. Beside the numbers lies an index, a line of JSON
for each child of a metric: its name, its labels, where its numbers begin and how many they are. A line
follows the numbers that it names, so that one that was cut off names nothing.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from operator import add
from pathlib import Path

from gateway.telemetry.counters import Labels
from gateway.telemetry.logs import EVENTS

NUMBERS = 1 << 20
"""Numbers that a sheet has room for; memory that is not used is not taken."""
_HEADER = 8
_BEAT, _STARTS = 0, 1
_BYTES = 8 * NUMBERS


class Sheet:
    """A worker's own counters (``telemetry.counters.Cells``)."""

    def __init__(self, directory: Path, worker: int) -> None:
        self.numbers = _mapped(_numbers_file(directory, worker), create=True)
        self._index = os.open(_index_file(directory, worker), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        whole = _Index(directory, worker)
        whole.read()
        os.ftruncate(self._index, whole.at)
        self._places = whole.places
        places = [place for children in whole.places.values() for place in children.values()]
        self._end = max([_HEADER, *(at + width for at, width in places)])
        self._full = False
        self.numbers[_STARTS] += 1
        self.beat()

    def take(self, name: str, labels: Labels, width: int) -> int | None:
        """Where a child's numbers begin."""
        known = self._places.setdefault(name, {}).get(labels)
        if known is not None and known[1] == width:
            return known[0]
        if self._end + width > NUMBERS:
            if not self._full:
                self._full = True
                logging.getLogger(EVENTS).error(
                    "there is no room for more metrics of several workers; some are not shown"
                )
            return None
        at, self._end = self._end, self._end + width
        os.write(self._index, json.dumps([name, labels, at, width]).encode() + b"\n")
        self._places[name][labels] = (at, width)
        return at

    def beat(self) -> None:
        """The event loop runs."""
        self.numbers[_BEAT] = time.time()

    def close(self) -> None:
        os.close(self._index)


class Sheets:
    """All workers' counters, for whoever is asked for the sum. It may be read in a thread."""

    def __init__(self, directory: Path, workers: int) -> None:
        self._directory = directory
        self._indices = [_Index(directory, worker) for worker in range(workers)]
        self._maps: list[memoryview[float] | None] = [None] * workers
        self._lock = threading.Lock()

    def numbers(self, name: str) -> dict[Labels, Sequence[float]]:
        """What all have counted of a metric, by its labels."""
        total: dict[Labels, Sequence[float]] = {}
        for index, numbers in self._read():
            for labels, (at, width) in tuple(index.places.get(name, {}).items()):
                # Arrays, since the collector of garbage looks at every list.
                mine = array("d", numbers[at : at + width])
                before = total.get(labels)
                total[labels] = mine if before is None else array("d", map(add, before, mine))
        return total

    def ages(self) -> dict[int, float]:
        """Seconds since each worker's event loop was last seen to run."""
        now = time.time()
        return {index.worker: max(0.0, now - numbers[_BEAT]) for index, numbers in self._read()}

    def restarts(self) -> dict[int, float]:
        """Times that each worker was started anew."""
        return {index.worker: max(0.0, numbers[_STARTS] - 1) for index, numbers in self._read()}

    def _read(self) -> list[tuple[_Index, memoryview[float]]]:
        with self._lock:
            return list(self._readable())

    def _readable(self) -> Iterator[tuple[_Index, memoryview[float]]]:
        for worker, index in enumerate(self._indices):
            numbers = self._maps[worker]
            if numbers is None:
                try:
                    numbers = self._maps[worker] = _mapped(_numbers_file(self._directory, worker))
                except (OSError, ValueError):
                    continue  # it has not begun yet
            index.read()
            yield index, numbers


class _Index:
    """What a sheet's numbers are of, read as far as it is written."""

    def __init__(self, directory: Path, worker: int) -> None:
        self.worker = worker
        self._path = _index_file(directory, worker)
        self.places: dict[str, dict[Labels, tuple[int, int]]] = {}
        self.at = 0
        """Bytes that have been read: whole lines."""

    def read(self) -> None:
        try:
            with self._path.open("rb") as file:
                file.seek(self.at)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines():
            name, labels, at, width = json.loads(line)
            self.places.setdefault(name, {})[tuple(labels)] = (at, width)
        self.at += len(whole)


def _numbers_file(directory: Path, worker: int) -> Path:
    return directory / f"counters-{worker}"


def _index_file(directory: Path, worker: int) -> Path:
    return directory / f"counters-{worker}.index"


def _mapped(path: Path, *, create: bool = False) -> memoryview[float]:
    """Raises OSError or ValueError for a file that is not there, or not whole."""
    descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
    try:
        if create:
            os.ftruncate(descriptor, _BYTES)
        return memoryview(mmap.mmap(descriptor, _BYTES)).cast("d")
    finally:
        os.close(descriptor)
