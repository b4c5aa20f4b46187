"""Seconds and memory of the stages of a benchmark, on a machine that others use as well."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil


class Stages:
    """Appends a JSON line per stage to ``file``: wall and CPU seconds (children's included), and the largest
    resident memory of this process during the stage, in MB. Linux only."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        file = self._file
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
        wall, cpu = time.monotonic(), cpu_seconds()
        yield
        made = {
            "stage": name,
            "wall_s": round(time.monotonic() - wall, 1),
            "cpu_s": round(cpu_seconds() - cpu, 1),
            "peak_mb": round(peak_memory() / 1e6),
        }
        print(made, file=sys.stderr, flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(made) + "\n")


def cpu_seconds() -> float:
    """User and system time of this process and all that it started, living or waited for."""
    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def peak_memory() -> int:
    """Bytes that were resident at most since the peak was last reset."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")
