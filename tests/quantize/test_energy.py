"""Joules from RAPL's counters and NVML's watts, and none where nothing tells."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from quantize.core.energy import NOTHING_TOLD, Meter
from tests.quantize.test_speed import Engine, measured

NO_GPU = (sys.executable, "-c", "raise SystemExit(1)")
GPUS = (sys.executable, "-c", "print('200.0'); print('[N/A]'); print('100.5')")


def package(root: Path, number: int, count: int, limit: int = 1_000_000) -> Path:
    path = root / f"intel-rapl:{number}"
    path.mkdir(parents=True)
    (path / "name").write_text(f"package-{number}\n")
    (path / "energy_uj").write_text(f"{count}\n")
    (path / "max_energy_range_uj").write_text(f"{limit}\n")
    return path


def test_packages_are_added_up_and_their_parts_are_not(tmp_path: Path) -> None:
    first, second = package(tmp_path, 0, 100_000), package(tmp_path, 1, 900_000)
    part = package(tmp_path, 2, 0)
    (part / "name").write_text("core\n")
    with Meter(tmp_path, NO_GPU) as meter:
        (first / "energy_uj").write_text("600000\n")
        (second / "energy_uj").write_text("200000\n")  # began anew at 1 J
        (part / "energy_uj").write_text("900000\n")
    assert meter.joules == pytest.approx(0.5 + 0.3)
    assert meter.source == "RAPL: 2 packages"


def test_a_gpu_tells_watts(tmp_path: Path) -> None:
    with Meter(tmp_path, GPUS) as meter:
        pass
    assert meter.joules is not None
    assert meter.joules > 0
    assert meter.source.startswith("NVML")


def test_where_nothing_tells_there_is_no_figure(tmp_path: Path) -> None:
    locked = package(tmp_path, 0, 0)
    (locked / "energy_uj").unlink()
    with Meter(tmp_path, NO_GPU) as meter:
        pass
    assert (meter.joules, meter.source) == (None, NOTHING_TOLD)


async def test_speed_says_how_many_tokens_a_joule_writes(tmp_path: Path) -> None:
    quiet = await measured(Engine([0.01]), 200, Meter(tmp_path, NO_GPU))
    told = await measured(Engine([0.01]), 200, Meter(tmp_path, GPUS))
    assert (quiet.tokens_per_joule, quiet.energy) == (None, NOTHING_TOLD)
    assert told.tokens_per_joule is not None
    assert told.tokens_per_joule > 0
    assert told.energy.startswith("NVML")
