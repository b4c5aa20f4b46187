"""Logs: JSON, a line per record, to standard error. Never a prompt or an answer.

A pipe that nobody reads takes 64 KiB and then blocks whoever writes to it. So a thread writes, from a queue
that has bounds; what finds no room is dropped and counted, and so is what a reader that has gone away did
not get.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec

EVENTS = "tiercel"
MOST_LINES = 100_000
MOST_BYTES = 32 << 20
"""Lines and bytes that wait to be written; beyond, they are counted and dropped."""
FLUSH_S = 1.0
"""For what waits to be written when the process ends."""
_AT_A_TIME = 1 << 20
"""Bytes of one write, about."""


class LogWriter:
    """Writes lines to a descriptor, in a thread of its own that begins with the first line."""

    def __init__(
        self, descriptor: int = 2, most_lines: int = MOST_LINES, most_bytes: int = MOST_BYTES
    ) -> None:
        self._descriptor = descriptor
        self._most_lines, self._most_bytes = most_lines, most_bytes
        self._queue: deque[tuple[bytes, int]] = deque()
        self._lines = self._bytes = 0
        self._more = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._dropped = 0

    def write(self, data: bytes, lines: int = 1) -> None:
        """So many whole lines. Never blocks, never raises; from any thread."""
        with self._more:
            if self._lines + lines > self._most_lines or self._bytes + len(data) > self._most_bytes:
                self._dropped += lines
                return
            self._queue.append((data, lines))
            self._lines += lines
            self._bytes += len(data)
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
            self._more.notify()

    def drop(self, lines: int = 1) -> None:
        """Count lines that never came here."""
        with self._more:
            self._dropped += lines

    def take_dropped(self) -> int:
        """Lines that nobody will read, since this was asked last."""
        with self._more:
            dropped, self._dropped = self._dropped, 0
        return dropped

    def close(self, within_s: float = FLUSH_S) -> None:
        """Write what waits, for so many seconds at most; later lines are dropped."""
        with self._more:
            self._closing = True
            self._more.notify()
            thread = self._thread
        if thread is not None:
            thread.join(within_s)

    def _run(self) -> None:
        while True:
            with self._more:
                while not self._queue:
                    if self._closing:
                        return
                    self._more.wait()
                parts, lines, size = [], 0, 0
                while self._queue and size < _AT_A_TIME:
                    data, count = self._queue.popleft()
                    parts.append(data)
                    lines += count
                    size += len(data)
            written = self._write(b"".join(parts))
            with self._more:
                self._lines -= lines
                self._bytes -= size
                if not written:
                    self._dropped += lines

    def _write(self, data: bytes) -> bool:
        """Whether all was written."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._descriptor, view) :]
            except BlockingIOError:  # somebody else has made the descriptor so
                select.select([], [self._descriptor], [], 1.0)
            except OSError:
                return False
        return True


class JsonLines(logging.Formatter):
    """A record as one JSON object; what was passed as ``extra={"fields": …}`` is part of it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class QueueHandler(logging.Handler):
    """Hands records to a writer. One that cannot be formatted is dropped and counted."""

    def __init__(self, writer: LogWriter) -> None:
        super().__init__()
        self._writer = writer
        self.setFormatter(JsonLines())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._writer.write(self.format(record).encode("utf-8", "replace") + b"\n")
        except Exception:
            self._writer.drop()


@contextlib.contextmanager
def logging_to_stderr() -> Iterator[LogWriter]:
    """Within the block every logger's records go to standard error, as JSON lines, and so does what Python
    itself would print there: warnings, and exceptions that nobody catches. Afterwards all is as it was."""
    root, writer = logging.getLogger(), LogWriter(2)
    level, handlers = root.level, root.handlers[:]
    in_threads, unraisables = threading.excepthook, sys.unraisablehook
    events = logging.getLogger(EVENTS)

    def in_thread(error: threading.ExceptHookArgs) -> None:
        if error.exc_value is not None:
            found = (error.exc_type, error.exc_value, error.exc_traceback)
            events.error("a thread failed", exc_info=found)

    def unraisable(error: sys.UnraisableHookArgs) -> None:
        events.error(
            "%s: %r", error.err_msg or "an exception was ignored in", error.object, exc_info=error.exc_value
        )

    root.handlers[:] = [QueueHandler(writer)]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    threading.excepthook, sys.unraisablehook = in_thread, unraisable
    try:
        yield writer
    finally:
        threading.excepthook, sys.unraisablehook = in_threads, unraisables
        logging.captureWarnings(False)
        root.setLevel(level)
        root.handlers[:] = handlers
        writer.close()


class AccessLog:
    """Lines of JSON, gathered and handed over together: by ``flush``, which is called from time to time."""

    def __init__(self, writer: LogWriter | None = None, most_lines: int = MOST_LINES) -> None:
        """``writer``: by default one of its own, to standard error."""
        self.writer = writer or LogWriter(2)
        self._most_lines = most_lines
        self._encode = msgspec.json.Encoder().encode
        self._lines: list[bytes] = []

    def write(self, line: Any) -> None:
        """``line`` is a msgspec.Struct."""
        if len(self._lines) < self._most_lines:
            self._lines.append(self._encode(line))
        else:
            self.writer.drop()

    def flush(self) -> None:
        """Never blocks."""
        if self._lines:
            lines, self._lines = self._lines, []
            self.writer.write(b"\n".join(lines) + b"\n", len(lines))
