"""What a piece of work took: seconds, the process's largest resident size, an accelerator's memory."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What makes the kernel forget the largest resident size so far (proc(5))."""


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
    try:
        yield taken
    finally:
        taken.seconds = time.monotonic() - start
        taken.peak_memory_bytes = peak_memory()
        taken.peak_device_bytes = _peak_device()


def peak_memory() -> int:
    """The largest resident size of this process, in bytes, since it was last reset."""
    with contextlib.suppress(OSError):
        for line in STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _peak_device() -> int | None:
    """Of all accelerators that torch has used in this process; None where there is none.

    Torch is asked only where it was imported, so that nothing is started for the question.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    devices = range(torch.cuda.device_count())
    return sum(int(torch.cuda.max_memory_allocated(device)) for device in devices)
