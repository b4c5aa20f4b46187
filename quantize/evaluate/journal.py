"""A file that only grows: JSON Lines in gzip members, one member per batch, each on disk before the next.

A process that is killed, or whose disk is full, leaves a whole file or one torn member at its end, which the
next who writes cuts off. ``zcat`` reads it.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantize.core.files import append_whole

Entry = Mapping[str, Any]
Job = Callable[[], Awaitable[Entry]]
BATCH = 32
"""Results that are written at once; so many may have to be asked again after a kill."""

_GZIP = 16 + zlib.MAX_WBITS


class Journal:
    """Entries that were written before, and a place for more. For one writer at a time; readers beside it
    change nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._end: int | None = None
        """Bytes of the file that are whole, once that is known."""

    def read(self) -> list[dict[str, Any]]:
        """All whole entries, in order."""
        entries, self._end = self._read()
        return entries

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        """All whole entries, and the bytes that they take in the file."""
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return [], 0
        entries: list[dict[str, Any]] = []
        at = 0
        while at < len(raw):
            member = zlib.decompressobj(_GZIP)
            try:
                text = member.decompress(memoryview(raw)[at:])
                lines = [json.loads(line) for line in text.splitlines()] if member.eof else None
            except (zlib.error, ValueError):
                lines = None
            if lines is None:
                break
            entries.extend(lines)
            at = len(raw) - len(member.unused_data)
        return entries, at

    def append(self, entries: Sequence[Entry]) -> None:
        """Write a batch after what is whole; when this returns it is on disk. Raises NoRoomError."""
        if not entries:
            return
        text = "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries)
        if self._end is None:
            _, self._end = self._read()
        member = gzip.compress(text.encode(), compresslevel=1)
        append_whole(self.path, member, self._end)
        self._end += len(member)


async def run_jobs(jobs: Sequence[Job], journal: Journal, advance: Callable[[], object]) -> list[Entry]:
    """Results of all jobs, in the order in which they came; whatever happens, those are in the journal."""
    entries: list[Entry] = []
    written = 0

    async def run(job: Job) -> None:
        nonlocal written
        entries.append(await job())
        advance()
        if len(entries) - written >= BATCH:
            written, first = len(entries), written
            journal.append(entries[first:])

    try:
        async with asyncio.TaskGroup() as group:
            for job in jobs:
                group.create_task(run(job))
    finally:
        journal.append(entries[written:])
    return entries
