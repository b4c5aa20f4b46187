"""What a piece of work took: seconds, the process's largest resident size, an accelerator's memory; and how
memory that is freed goes back to the system.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What makes the kernel forget the largest resident size so far (proc(5))."""

_MMAP_THRESHOLD = -3
"""``M_MMAP_THRESHOLD`` of glibc's ``mallopt`` (malloc.h)."""
APART_BYTES, MOST_APART_BYTES = 256 << 10, 32 << 20
"""What is mapped apart within :func:`freed_at_once`, and what glibc comes to by itself."""


@dataclass
class Taken:
    """Filled in when the block ends. Bytes; resident pages of mapped files are among them."""

    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    peak_device_bytes: int | None = None


@contextlib.contextmanager
def measured() -> Iterator[Taken]:
    """Within the block, what it takes is measured.

    The largest size is the block's own where the kernel lets it be reset, else the process's so far.
    """
    taken, start = Taken(), time.monotonic()
    with contextlib.suppress(OSError):
        CLEAR.write_text(RESET_PEAK)
    for device in _devices():
        _cuda().reset_peak_memory_stats(device)
    try:
        yield taken
    finally:
        taken.seconds = time.monotonic() - start
        taken.peak_memory_bytes = peak_memory()
        taken.peak_device_bytes = _peak_device()


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """Within the block, arrays above ``APART_BYTES`` go back to the system when they are freed.

    glibc keeps arrays of up to 32 MB in its heap once one such has been freed, where tensors of many sizes
    leave holes: half a gigabyte of them under a model of 135 M parameters that is trained. Mapped apart each
    costs the system's time, so this is for whoever would rather have the memory. Without glibc nothing
    changes.
    """
    try:
        libc = ctypes.CDLL(None)
        trim, set_option = libc.malloc_trim, libc.mallopt
    except (OSError, AttributeError):
        yield
        return
    trim(0)
    set_option(_MMAP_THRESHOLD, APART_BYTES)
    try:
        yield
    finally:
        set_option(_MMAP_THRESHOLD, MOST_APART_BYTES)


def peak_memory() -> int:
    """The largest resident size of this process, in bytes, since it was last reset."""
    with contextlib.suppress(OSError):
        for line in STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def give_back() -> None:
    """What torch keeps of GPUs' memory for later tensors goes back, for an engine that is to have it."""
    if _devices():
        gc.collect()
        _cuda().empty_cache()


def _peak_device() -> int | None:
    """Of all accelerators that torch has used in this process; None where there is none."""
    found = [int(_cuda().max_memory_allocated(device)) for device in _devices()]
    return sum(found) if found else None


def _cuda() -> Any:
    return sys.modules["torch"].cuda


def _devices() -> range:
    """Those that torch has used. It is asked only where it was imported, so that nothing is started for the
    question."""
    used = "torch" in sys.modules and _cuda().is_initialized()
    return range(_cuda().device_count() if used else 0)
