"""How fast this machine multiplies matrices, measured in a second, on which estimates of time stand."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import cache

SECONDS = 0.3
"""Of a core, or of an accelerator, for each type."""


@dataclass(frozen=True)
class Rates:
    """Operations per second, two per multiplication and addition, of one core or of the accelerator.

    A core's are per second of its own time: other processes that want it do not lower them.
    """

    wide: float
    """In float32."""
    narrow: float
    """In bfloat16."""
    cores: int
    """That this process may use; all are taken to be idle."""
    accelerator: bool = False


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


@cache
def machine_rates() -> Rates:
    """Of this machine's accelerator where there is one, else of its processor."""
    from quantize.make.blocks import best_device

    wide, narrow = matmul_rate("float32"), matmul_rate("bfloat16")
    return Rates(wide, narrow, usable_cores(), best_device().type != "cpu")


@cache
def matmul_rate(dtype: str = "float32", device: str | None = None) -> float:
    """Operations per second of one core, in its own time, on (512, 1024) x (1024, 1024); on an accelerator of
    (8192, 4096) x (4096, 4096), in time as it passes. The best of many products counts.

    ``dtype`` is torch's name; ``device`` the accelerator by default, where there is one.
    """
    import torch

    from quantize.make.blocks import best_device

    where = torch.device(device) if device else best_device()
    on_cpu = where.type == "cpu"
    rows, width = (512, 1024) if on_cpu else (8192, 4096)
    clock = time.process_time if on_cpu else time.perf_counter
    kind, threads = getattr(torch, dtype), torch.get_num_threads()
    left = torch.ones(rows, width, dtype=kind, device=where)
    right = torch.ones(width, width, dtype=kind, device=where)
    torch.set_num_threads(1)
    try:
        times: list[float] = []
        while len(times) < 2 or sum(times) < SECONDS:  # the first one loads the library too
            start = clock()
            left @ right
            if not on_cpu:
                torch.accelerator.synchronize()
            times.append(max(clock() - start, 1e-6))
    finally:
        torch.set_num_threads(threads)
    return 2.0 * rows * width * width / min(times)
