"""Which NVIDIA GPUs are here: the one way in which this project asks.

``nvidia-smi`` is asked. ``/proc/driver/nvidia`` says nothing in a container (it is the host's) and does not
exist under WSL2, where the driver is Windows' and ``nvidia-smi`` lies in a folder of its own. An engine sees
GPUs through the same library (NVML), so that what ``nvidia-smi`` does not see it cannot use either.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

WSL = Path("/usr/lib/wsl/lib/nvidia-smi")
"""Where WSL2 puts it, which is not on every PATH."""
TIMEOUT_S = 60.0
"""A driver that nobody uses is loaded for it, one GPU after the other."""
NOTHING_THERE = (6, 9)
"""Its exit statuses where there is no GPU (6) or no driver (9), as on a machine that only has the command."""


class GpuError(RuntimeError):
    """There should be GPUs, and ``nvidia-smi`` cannot say which. The text has its words."""


def nvidia_smi() -> tuple[str, ...]:
    """The command, found on PATH or where WSL2 has it; its bare name where it is in neither place."""
    found = shutil.which("nvidia-smi") or (str(WSL) if WSL.is_file() else "nvidia-smi")
    return (found,)


def ask_gpus(fields: Sequence[str], command: Sequence[str] | None = None) -> list[tuple[str, ...]]:
    """The ``fields`` (of ``nvidia-smi --help-query-gpu``) of every GPU, units left out; empty without any.

    Of GPUs one of which fails those are told that do not: in its place stands a sentence. Raises GpuError
    where it is not known: to take such a machine for one without GPUs would be to quantize for its
    processor.
    """
    asked = [*(command or nvidia_smi()), f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except OSError:
        return []
    except subprocess.TimeoutExpired:
        raise GpuError(
            f"nvidia-smi did not answer within {TIMEOUT_S:.0f} s; see whether a GPU or its driver hangs "
            "(`dmesg`)"
        ) from None
    if done.returncode in NOTHING_THERE:
        return []
    lines = (tuple(part.strip() for part in line.split(",")) for line in done.stdout.splitlines())
    rows = [row for row in lines if len(row) == len(fields)]
    if done.returncode:
        rows = [row for row in rows if not any(": " in part for part in row)]
    if not rows and done.returncode:
        words = " ".join((done.stdout + done.stderr).split())[:300]
        raise GpuError(f"nvidia-smi ended with status {done.returncode}: {words}; mend the GPU or its driver")
    return rows
