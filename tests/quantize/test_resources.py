"""What making took is measured, by the block."""

import mmap
import subprocess
import sys

from quantize.core.resources import measured


def test_the_peak_is_the_blocks_own() -> None:
    size = 128 << 20
    with measured() as large:
        _touch(size)
    with measured() as small:
        _touch(1 << 20)
    assert large.peak_memory_bytes is not None
    assert small.peak_memory_bytes is not None
    assert large.peak_memory_bytes > small.peak_memory_bytes + size // 2
    assert 0 < small.seconds < 60
    assert small.peak_device_bytes is None


def _touch(size: int) -> None:
    with mmap.mmap(-1, size) as pages:
        pages[::4096] = b"x" * len(range(0, size, 4096))


HOLES = """
import contextlib, os, sys
from pathlib import Path

from quantize.core.resources import freed_at_once

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

b"x" * (30 << 20)  # upon which glibc keeps what is smaller in its heap
with freed_at_once() if sys.argv[1] == "apart" else contextlib.nullcontext():
    before, small, large = resident(), [], []
    for _ in range(16):
        large.append(b"x" * (8 << 20))
        small.append(b"x" * (100 << 10))
    del large
    print(resident() - before)
"""


def test_what_is_freed_goes_back_although_something_lies_behind_it() -> None:
    left = {
        how: int(subprocess.run([sys.executable, "-c", HOLES, how], capture_output=True, check=True).stdout)
        for how in ("in the heap", "apart")
    }
    assert left["in the heap"] > 100 << 20
    assert left["apart"] < 8 << 20
