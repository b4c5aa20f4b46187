"""Energy that a machine takes, where it tells: a processor's packages by RAPL, NVIDIA's GPUs by NVML.

>>> with Meter() as meter:
...     work()
>>> meter.joules, meter.source
(412.7, 'RAPL: 1 package')

RAPL counts joules since some time ago and begins anew at a limit (``energy_uj`` and ``max_energy_range_uj``
of Linux's powercap); mostly only root may read it. GPUs tell watts, asked of ``nvidia-smi`` every second and
added up. Both are of everything that runs there: measure on an idle machine. Virtual machines mostly tell
nothing, and then :attr:`Meter.joules` is None and :attr:`Meter.source` says so.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from quantize.core.gpus import GpuError, ask_gpus

POWERCAP = Path("/sys/class/powercap")
EVERY_S = 1.0
NOTHING_TOLD = "this machine does not tell"


class Meter:
    """Energy within the block, sampled by a thread of its own."""

    def __init__(
        self, powercap: Path = POWERCAP, command: Sequence[str] | None = None, every_s: float = EVERY_S
    ) -> None:
        """``command`` stands for ``nvidia-smi``."""
        self._command, self._every_s = command, every_s
        self._packages = {path: count for path in _packages(powercap) if (count := _count(path)) is not None}
        self._watts, self._at = self._power(), time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="energy", daemon=True)
        self._joules = 0.0

    def __enter__(self) -> Meter:
        self._packages = {path: _count(path) or 0 for path in self._packages}
        self._at = time.monotonic()
        if self.tells:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.tells:
            self._done.set()
            self._thread.join()
            self._add()

    @property
    def tells(self) -> bool:
        return bool(self._packages) or self._watts is not None

    @property
    def joules(self) -> float | None:
        """Of all that tell; None where nothing does."""
        return self._joules if self.tells else None

    @property
    def source(self) -> str:
        """What told it, for people."""
        packages = len(self._packages)
        told = [f"RAPL: {packages} package{'s' if packages > 1 else ''}"] if packages else []
        told += ["NVML: power of the GPUs, every second"] if self._watts is not None else []
        return ", ".join(told) or NOTHING_TOLD

    def _sample(self) -> None:
        while not self._done.wait(self._every_s):
            self._add()

    def _add(self) -> None:
        """What came since the last time."""
        for path, before in self._packages.items():
            now = _count(path)
            if now is None:
                continue
            if now < before:  # it has begun anew
                self._joules += (_limit(path) - before + now) / 1e6
            else:
                self._joules += (now - before) / 1e6
            self._packages[path] = now
        if self._watts is not None and (watts := self._power()) is not None:
            now_s = time.monotonic()
            self._joules += (self._watts + watts) / 2 * (now_s - self._at)
            self._watts, self._at = watts, now_s

    def _power(self) -> float | None:
        """Watts of all GPUs together; None where none tells."""
        told: list[float] = []
        with contextlib.suppress(GpuError):
            for (text,) in ask_gpus(["power.draw"], self._command):
                with contextlib.suppress(ValueError):
                    told.append(float(text))
        return sum(told) if told else None


def _packages(powercap: Path) -> list[Path]:
    """Domains that are whole packages: their parts are counted in them."""
    found = []
    for path in sorted(powercap.glob("*-rapl:*")):
        with contextlib.suppress(OSError):
            if (path / "name").read_text(encoding="utf-8").startswith("package"):
                found.append(path)
    return found


def _count(path: Path) -> int | None:
    """Microjoules; None where nobody may read them."""
    try:
        return int((path / "energy_uj").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _limit(path: Path) -> int:
    try:
        return int((path / "max_energy_range_uj").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
