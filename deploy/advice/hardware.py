"""What engines or training are to run on: this machine, or one that is described in a few words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from deploy.placement import GIB, Gpu, Machine
from quantize.core.legality import Target
from quantize.core.shape import ShapeError
from quantize.core.targets import TARGETS, TargetError, detect_cpu, target

AMPERE, ADA, HOPPER, BLACKWELL = (f"vllm-cuda-{name}" for name in ("ampere", "ada", "hopper", "blackwell"))
GPUS: Mapping[str, tuple[float, str]] = {
    "A100": (80, AMPERE), "A100-40": (40, AMPERE), "A10": (22.5, AMPERE), "A30": (24, AMPERE),
    "A40": (45, AMPERE), "A6000": (48, AMPERE), "RTX3090": (24, AMPERE), "RTX3060": (12, AMPERE),
    "L4": (22.5, ADA), "L40": (45, ADA), "L40S": (45, ADA), "RTX4090": (24, ADA), "RTX4080": (16, ADA),
    "RTX4060": (8, ADA),
    "H100": (79.6, HOPPER), "H200": (140.4, HOPPER), "H20": (96, HOPPER), "GH200": (96, HOPPER),
    "RTX5090": (32, BLACKWELL), "RTX5080": (16, BLACKWELL), "B200": (180, BLACKWELL),
    "B300": (268, BLACKWELL),
}  # fmt: skip
"""Name to memory, GiB as nvidia-smi tells it, and target."""
BY_SIZE = ADA
"""The target of a GPU of which the memory alone is told."""
_GPUS = re.compile(r"(?:(\d{1,4})\s*[x*]\s*)?([A-Za-z][\w-]*|\d+(?:\.\d+)?\s*(?:GB|GiB|G)?)", re.IGNORECASE)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:GB|GiB|G)?", re.IGNORECASE)
MOST_GPUS, MOST_GIB = 64, 100_000

Kind = Literal["gpu", "cpu", "edge"]


@dataclass(frozen=True)
class Hardware:
    """A machine, and what its engine loads. ``edge`` is a device that vLLM does not run on: llama.cpp "
    "does."""

    kind: Kind
    machine: Machine
    name: str
    target: Target | None = None
    here: bool = False
    note: str = ""
    """What was assumed."""
    option: str = ""
    """What says the same on the command line; empty for this machine."""

    @property
    def memory(self) -> int:
        """Free bytes, of all GPUs together, else of the machine."""
        return sum(gpu.free for gpu in self.machine.gpus) or self.machine.memory_free


def described_gpus(text: str, target_name: str | None = None, option: str = "--gpu") -> Hardware:
    """``24GB``, ``H100``, ``4xH100`` or ``2x24GB``. Sizes are GiB, as cards have them. ``option`` is where it
    was given. Raises ShapeError and TargetError."""
    found = _GPUS.fullmatch(text.strip())
    count = int(found[1] or 1) if found else 0
    if not found or not 0 < count <= MOST_GPUS:
        raise ShapeError(
            f"{option} {text}: give a size or a name, and how many, such as 24GB, H100 or 4xH100"
        )
    what = found[2].upper().replace("GIB", "GB")
    note = ""
    if sized := _SIZE.fullmatch(what):
        size, name = float(sized[1]), BY_SIZE
        if target_name is None:
            note = f"the rules of {BY_SIZE} are assumed for a GPU of {size:g} GB; --target says otherwise"
    else:
        known = {one.replace("-", ""): one for one in GPUS}
        if (plain := what.replace("-", "").removesuffix("80GB")) not in known:
            raise ShapeError(
                f"{option} {text}: {found[2]} is not known; give its memory, such as 24GB, or one of "
                f"{', '.join(GPUS)}"
            )
        size, name = GPUS[known[plain]]
    if not 1 <= size <= MOST_GIB:
        raise ShapeError(f"{option} {text}: {size:g} GB is no GPU's memory; give at least 1GB")
    where = _on(target_name or name, "vllm-cuda", option)
    each = round(size * GIB)
    gpus = tuple(Gpu(index, found[2], each, each) for index in range(count))
    title = f"{count} x {found[2]}" if count > 1 else f"one GPU, {found[2]}"
    again = f"--gpu {text.strip().replace(' ', '')}" + (f" --target {target_name}" if target_name else "")
    return Hardware("gpu", Machine({0: (0,)}, each * count, gpus), title, where, note=note, option=again)


def described_cpu(text: str, target_name: str | None = None) -> Hardware:
    """``32GB``: a machine without a GPU and so much free memory. Raises ShapeError and TargetError."""
    size = _memory(text, "--cpu")
    name = target_name or detect_cpu() or "vllm-cpu-vnni"
    where = _on(name, "vllm-cpu", "--cpu")
    note = "" if target_name else f"the processor is taken to be {where.processor}; --target says otherwise"
    option = f"--cpu {text.strip().replace(' ', '')}" + (f" --target {target_name}" if target_name else "")
    title = f"a machine with {text} and no GPU"
    return Hardware("cpu", Machine({0: (0,)}, size), title, where, note=note, option=option)


def described_edge(text: str) -> Hardware:
    """``8GB``: a laptop, a phone, a small board. Raises ShapeError."""
    machine = Machine({0: (0,)}, _memory(text, "--edge"))
    option = f"--edge {text.strip().replace(' ', '')}"
    return Hardware("edge", machine, f"a device with {text}, llama.cpp", option=option)


def this_machine(target_name: str | None = None) -> Hardware:
    """As it is now: what is free counts. Raises TargetError."""
    from deploy.machine import look

    machine = look()
    if target_name is None:
        where = target("vllm-cuda" if machine.gpus else "vllm-cpu")
    else:
        where = _on(target_name, "vllm-cuda" if machine.gpus else "vllm-cpu", "this machine")
    if machine.gpus:
        count = len(machine.gpus)
        title = f"this machine, {machine.gpus[0].name}" + (f" x {count}" if count > 1 else "")
        return Hardware("gpu", machine, title, where, here=True)
    free = f"{machine.memory_free / GIB:.1f} GiB free"
    return Hardware("cpu", machine, f"this machine, {machine.cores} cores, {free}", where, here=True)


def _memory(text: str, option: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    if not found or not 0.25 <= float(found[1]) <= MOST_GIB:
        raise ShapeError(f"{option} {text}: give its free memory, such as 16GB")
    return round(float(found[1]) * GIB)


def _on(name: str, kind: str, option: str) -> Target:
    """The target, which must be of that kind of processor."""
    if name in TARGETS and not name.startswith(kind):
        known = ", ".join(one for one in TARGETS if one.startswith(kind))
        raise TargetError(f"--target {name} is no target of {option}; name one of {known}")
    return target(name)
