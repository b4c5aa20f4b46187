"""Builds the accelerator: a library that torch loads."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("pretend.cpp")
BUILT = Path(__file__).parents[2] / "var" / "tests"
NAME = "pretend"
LIBRARIES = ("-ltorch", "-ltorch_cpu", "-lc10")


def compiler() -> str | None:
    """The C++ compiler; None where there is none."""
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def built() -> Path:
    """The shared library, compiled where it is missing (20 s). Raises CalledProcessError."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    library = BUILT / f"{NAME}-{key}.so"
    if not library.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        paths = [f"-I{path}" for path in include_paths()]
        paths += [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
        command = [str(compiler()), "-std=c++20", "-O0", "-w", "-fPIC", "-shared", str(SOURCE)]
        subprocess.run([*command, *paths, *LIBRARIES, "-o", str(partial)], check=True)
        partial.rename(library)
    return library
