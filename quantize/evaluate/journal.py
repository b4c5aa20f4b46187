"""A file that only grows: JSON Lines in gzip members, one member per batch, each on disk before the next.

A process that is killed leaves a whole file or one torn member at its end, which is cut off when the file
is opened again. ``zcat`` reads it.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Entry = Mapping[str, Any]
Job = Callable[[], Awaitable[Entry]]
BATCH = 32
"""Results that are written at once; so many may have to be asked again after a kill."""

_GZIP = 16 + zlib.MAX_WBITS


class Journal:
    """Entries that were written before, and a place for more. Not for several writers at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All whole entries, in order; a torn end is removed from the file."""
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return []
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
                os.truncate(self.path, at)
                break
            entries.extend(lines)
            at = len(raw) - len(member.unused_data)
        return entries

    def append(self, entries: Sequence[Entry]) -> None:
        """Write a batch; when this returns it is on disk."""
        if not entries:
            return
        text = "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(gzip.compress(text.encode(), compresslevel=1))
            file.flush()
            os.fsync(file.fileno())


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
