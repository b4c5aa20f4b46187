"""Logs: JSON, a line per record, to standard error. Never a prompt or an answer."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any

import msgspec

EVENTS = "tiercel"
MOST_LINES = 100_000
"""Lines that wait to be written; beyond, they are counted and dropped."""


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


def log_to_stderr() -> None:
    """Send every logger's records to standard error, as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class AccessLog:
    """Lines of JSON, gathered and written together: by ``flush``, which is called from time to time."""

    def __init__(self, descriptor: int = 2) -> None:
        self._descriptor = descriptor
        self._encode = msgspec.json.Encoder().encode
        self._lines: list[bytes] = []
        self.dropped = 0

    def write(self, line: Any) -> None:
        """``line`` is a msgspec.Struct."""
        if len(self._lines) < MOST_LINES:
            self._lines.append(self._encode(line))
        else:
            self.dropped += 1

    def flush(self) -> None:
        """A reader that has gone away loses lines; it stops no request."""
        if not self._lines:
            return
        lines, self._lines = self._lines, []
        data = b"\n".join(lines) + b"\n"
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._descriptor, data) :]
