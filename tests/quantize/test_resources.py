"""What making took is measured, by the block."""

import mmap

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
