"""What a fake engine did, request by request: the other side of the gateway's books.

An account may lie in a file, which is mapped into memory: what was entered is there also when the process
was killed, and other processes can read it.
"""

from __future__ import annotations

import mmap
import struct
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ENTRY = struct.Struct("<64s32sIIIBx")
"""Request id, path, prompt, cached and completion tokens, state."""
_COUNT = struct.Struct("<Q")
_FIRST_ENTRIES = 1 << 10
RUNNING, REPORTED, BROKEN, REFUSED = range(4)


@dataclass(frozen=True, slots=True)
class Work:
    """One request. Tokens are counted as they are taken in and written, whoever reads them."""

    request_id: str
    path: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    state: int
    """``REPORTED``: its answer was written to the end, with its usage. ``BROKEN``: it was cut off, by either
    side. ``REFUSED``: it did no work. ``RUNNING``: not over, or the process died."""


class Account:
    """Entries of requests, in order of arrival. Safe to use from threads."""

    def __init__(self, path: Path | None = None) -> None:
        """With a ``path``, what is there already goes on."""
        size = _place(_FIRST_ENTRIES)
        self._lock = threading.Lock()
        with open(path, "a+b") if path is not None else tempfile.TemporaryFile() as file:
            file.truncate(max(size, file.seek(0, 2)))
            self._map = mmap.mmap(file.fileno(), 0)

    def __len__(self) -> int:
        return int(_COUNT.unpack_from(self._map)[0])

    def __iter__(self) -> Iterator[Work]:
        for number in range(len(self)):
            identity, path, *counts = _ENTRY.unpack_from(self._map, _place(number))
            yield Work(identity.rstrip(b"\0").decode(), path.rstrip(b"\0").decode(), *counts)

    def open(self, request_id: str, path: str) -> Entry:
        with self._lock:
            number = len(self)
            if _place(number + 1) > len(self._map):
                self._map.resize(2 * len(self._map))
            entry = Entry(self, _place(number), request_id, path)
            _COUNT.pack_into(self._map, 0, number + 1)
        entry.write()
        return entry

    def write(self, place: int, values: tuple[Any, ...]) -> None:
        with self._lock:
            _ENTRY.pack_into(self._map, place, *values)


def _place(number: int) -> int:
    return _COUNT.size + _ENTRY.size * number


class Entry:
    """One request's counts while it runs; each change is in the account at once."""

    def __init__(self, account: Account, place: int, request_id: str, path: str) -> None:
        self._account, self._place = account, place
        self._names = request_id.encode()[:64], path.encode()[:32]
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0
        self.state = RUNNING

    def take_in(self, prompt: int, cached: int = 0) -> None:
        """The prompt."""
        self.prompt_tokens, self.cached_tokens = prompt, cached
        self.write()

    def produce(self, tokens: int) -> None:
        self.completion_tokens += tokens
        self.write()

    def end(self, state: int) -> None:
        """The first word on it stands."""
        if self.state == RUNNING:
            self.state = state
            self.write()

    def write(self) -> None:
        counts = self.prompt_tokens, self.cached_tokens, self.completion_tokens, self.state
        self._account.write(self._place, (*self._names, *counts))
