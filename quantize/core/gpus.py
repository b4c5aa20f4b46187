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
TIMEOUT_S = 20.0


def nvidia_smi() -> tuple[str, ...]:
    """The command, found on PATH or where WSL2 has it; its bare name where it is in neither place."""
    found = shutil.which("nvidia-smi") or (str(WSL) if WSL.is_file() else "nvidia-smi")
    return (found,)


def ask_gpus(fields: Sequence[str], command: Sequence[str] | None = None) -> list[tuple[str, ...]]:
    """The ``fields`` (of ``nvidia-smi --help-query-gpu``) of every GPU, units left out; empty without any."""
    query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(
            [*(command or nvidia_smi()), *query],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (tuple(part.strip() for part in line.split(",")) for line in asked.stdout.splitlines())
    return [row for row in rows if len(row) == len(fields)]
