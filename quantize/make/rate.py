"""How fast this machine multiplies matrices, measured in a second, on which estimates of time stand."""

from __future__ import annotations

import time
from functools import cache

SECONDS = 0.4


@cache
def matmul_rate(dtype: str = "float32", device: str | None = None) -> float:
    """Operations per second of (2048, 1024) x (1024, 1024), two per multiplication and addition.

    ``dtype`` is torch's name; ``device`` the accelerator by default, where there is one.
    """
    import torch

    from quantize.make.blocks import best_device

    where = torch.device(device) if device else best_device()
    kind = getattr(torch, dtype)
    scale = 4 if where.type != "cpu" else 1
    left = torch.ones(2048 * scale, 1024 * scale, dtype=kind, device=where)
    right = torch.ones(1024 * scale, 1024 * scale, dtype=kind, device=where)
    left @ right
    done, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < SECONDS:
        left @ right
        done += 1
        if where.type != "cpu":
            torch.accelerator.synchronize()
    return 2.0 * left.shape[0] * left.shape[1] * right.shape[1] * done / took
