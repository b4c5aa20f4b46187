"""Where an engine runs: which cores or GPUs it gets, and how much memory. Pure; :mod:`deploy.machine` looks.

On a GPU an engine gets ``--kv-cache-memory-bytes``, with which it takes its weights, that cache and about
:data:`GPU_OVERHEAD` and measures nothing; without it, it asks for 92 % of the card and refuses to start
beside another (vLLM 0.32; measured on one H100). A model that fits no single GPU is split over the fewest
that hold it. On a CPU every engine gets cores of its own: two that share them wait for each other (50
tokens in 19.5 s instead of under 2 s on two cores, measured).
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

GIB = 1 << 30
GPU_OVERHEAD = 3 * GIB // 2
"""Beside weights and KV cache: CUDA's context, workspaces, graphs. Measured: about 1.5 GiB."""
CPU_OVERHEAD = 3 * GIB // 2
"""Beside weights and KV cache: an engine's three processes. Measured: 2.6 GiB with 1 GiB of cache."""
WEIGHTS_FACTOR = 1.05
"""What kernels that repack weights add to them."""
MOST_RANKS = 8


class PlacementError(RuntimeError):
    """An engine fits nowhere on this machine. The text says what it needs and what there is."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as ``nvidia-smi`` lists it; memory in bytes, 0 in all where it does not tell."""

    index: int
    name: str
    total: int
    free: int
    uuid: str = ""
    """Empty where it was not asked for, as of the only one."""


@dataclass(frozen=True)
class Machine:
    """What engines may use. ``nodes`` are the physical cores (a logical CPU of each) per NUMA node."""

    nodes: Mapping[int, tuple[int, ...]]
    memory_free: int
    gpus: tuple[Gpu, ...] = ()
    driver: str = ""

    @property
    def cores(self) -> int:
        return sum(len(cores) for cores in self.nodes.values())


@dataclass(frozen=True)
class Need:
    """One engine to place."""

    name: str
    weight_bytes: int
    kv_bytes: int
    heads: tuple[int, ...] = ()
    """KV heads and attention heads, which ranks divide."""
    env: Mapping[str, str] = field(default_factory=dict)
    """The user's own, which decides where it says something, as do the arguments."""
    arguments: tuple[str, ...] = ()
    token_bytes: int = 0
    """Of the KV cache, of one token; 0 where it is not known."""
    context: int = 0
    """Tokens that it is to take."""
    kv_dtype: str = "auto"
    overhead: int = CPU_OVERHEAD
    """Bytes beside weights and KV cache, where it runs on cores."""
    on_cores: bool = False
    """It runs on cores where there are GPUs as well."""
    needed: bool = False
    """A fleet cannot do without it, as without a reference that the watch asks."""


@dataclass(frozen=True)
class Placed:
    """Where an engine runs, as its environment and arguments, and what it takes away from others."""

    env: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    gpus: tuple[int, ...] = ()
    cores: tuple[int, ...] = ()
    memory: int = 0
    """Bytes on every one of ``gpus``, else of the machine's memory."""
    where: str = ""


def place(machine: Machine, need: Need, busy: Sequence[Placed], at_once: int) -> Placed | None:
    """A place for one more engine beside those in ``busy``; None while they leave no room.

    ``at_once`` is how many engines will run side by side, which divide the cores. Raises PlacementError where
    it would not fit alone either.
    """
    if machine.gpus and not need.on_cores:
        return _on_gpus(machine, need, busy)
    return _on_cores(machine, need, busy, at_once)


def arranged(machine: Machine, needs: Sequence[Need]) -> list[Placed] | None:
    """Places for engines that all run at once, in their order; None where not all fit.

    On a GPU the largest are placed first, which leaves the fewest gaps. On a CPU engines that serve may share
    cores, for what they wait for most is the next request; memory they never share.
    """
    found: dict[int, Placed] = {}
    order: Sequence[int] = range(len(needs))
    if machine.gpus:
        order = sorted(order, key=lambda number: -taken_by(needs[number]))
    for number in order:
        need, busy = needs[number], list(found.values())
        try:
            placed = place(machine, need, busy, len(needs))
        except PlacementError:
            return None
        beside = [one for one in busy if not one.gpus]
        if placed is None and beside and (need.on_cores or not machine.gpus):
            memory = _memory_on_cores(need)
            if memory + sum(one.memory for one in beside) <= machine.memory_free:
                shared = beside[number % len(beside)]
                placed = dataclasses.replace(shared, memory=memory, where=f"{shared.where}, shared")
        if placed is None:
            return None
        found[number] = placed
    return [found[number] for number in range(len(needs))]


def _on_gpus(machine: Machine, need: Need, busy: Sequence[Placed]) -> Placed | None:
    gpus = visible(machine.gpus, need.env)
    if any(argument.partition("=")[0] in _OWN_SHARE for argument in need.arguments):
        # The user shares the card out; nothing of it is known here.
        return Placed(where="by engine.extra_args")
    if gpus and not any(gpu.total for gpu in gpus):
        raise PlacementError(
            f"{need.name}: nvidia-smi tells no memory of {gpus[0].name}, as of a part of a GPU or of one "
            "that shares the machine's memory; say what an engine may take: engine.extra_args "
            "[--gpu-memory-utilization, SHARE, --kv-cache-memory-bytes, BYTES]"
        )
    taken = {gpu.index: sum(one.memory for one in busy if gpu.index in one.gpus) for gpu in gpus}
    for ranks in _possible_ranks(need, len(gpus)):
        cache = need.kv_bytes // min((ranks, *need.heads))  # fewer KV heads than ranks are repeated
        share = round(need.weight_bytes * WEIGHTS_FACTOR / ranks) + cache + GPU_OVERHEAD
        if sum(share <= gpu.free for gpu in gpus) < ranks:
            continue  # not even alone: more ranks
        free = sorted((gpu for gpu in gpus if share <= gpu.free - taken[gpu.index]), key=lambda g: -g.free)
        if len(free) < ranks:
            return None
        chosen = tuple(sorted(gpu.index for gpu in free[:ranks]))
        added: tuple[str, ...] = ("--gpu-memory-utilization", "0.05")
        added += ("--kv-cache-memory-bytes", str(cache))
        if ranks > 1:
            added += ("--tensor-parallel-size", str(ranks))
        listed = ",".join(map(str, chosen))
        numbered = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": listed}  # as nvidia-smi does
        return Placed(numbered, added, chosen, (), share, f"GPU {listed}")
    have = ", ".join(
        f"GPU {gpu.index} {gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free" for gpu in gpus
    )
    raise PlacementError(
        f"{need.name} needs {need.weight_bytes / GIB:.1f} GiB for weights, {need.kv_bytes / GIB:.1f} for the "
        f"KV cache and {GPU_OVERHEAD / GIB:.1f} on every GPU; there is {have or _NONE_VISIBLE}"
    )


_NONE_VISIBLE = "no GPU that is visible (CUDA_VISIBLE_DEVICES, here or in engine.env)"


def taken_by(need: Need) -> int:
    """Bytes that the engine takes in all, on one GPU or of the machine's memory."""
    return round(need.weight_bytes * WEIGHTS_FACTOR) + need.kv_bytes + GPU_OVERHEAD


_OWN_SHARE = ("--gpu-memory-utilization", "--kv-cache-memory-bytes", "--tensor-parallel-size", "-tp")


def share_options(arguments: Sequence[str]) -> dict[str, Any]:
    """What of an engine's ``arguments`` says how much it takes of which GPUs, as options of vLLM's ``LLM``.
    Raises PlacementError for what is no number.

    >>> share_options(["--gpu-memory-utilization", "0.05", "-tp=2", "--max-num-seqs", "8"])
    {'gpu_memory_utilization': 0.05, 'tensor_parallel_size': 2, 'distributed_executor_backend': 'mp'}
    """
    found: dict[str, Any] = {}
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("-") else [word])]
    for name, value in itertools.pairwise(words):
        if name in _OWN_SHARE:
            option = "tensor_parallel_size" if name == "-tp" else name.removeprefix("--").replace("-", "_")
            try:
                found[option] = float(value) if option == "gpu_memory_utilization" else int(value)
            except ValueError:
                raise PlacementError(f"{name} {value}: is no plain number; write it out") from None
    if found.get("tensor_parallel_size", 1) > 1:
        found["distributed_executor_backend"] = "mp"
    return found


def visible(gpus: Sequence[Gpu], env: Mapping[str, str]) -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, by index or by UUID, up to the first that there is not, as
    CUDA has it; all without it. Parts of GPUs (MIG) leave all."""
    named = env.get("CUDA_VISIBLE_DEVICES")
    if named is None or "MIG-" in named:
        return tuple(gpus)
    found: list[Gpu] = []
    for entry in map(str.strip, named.split(",")):
        by_id = (gpu for gpu in gpus if entry.startswith("GPU-") and (gpu.uuid or entry).startswith(entry))
        one = next(by_id, None) or next((gpu for gpu in gpus if str(gpu.index) == entry), None)
        if one is None:
            break
        found.append(one)
    return tuple(dict.fromkeys(found))


def _possible_ranks(need: Need, gpus: int) -> list[int]:
    powers = [1 << power for power in range(MOST_RANKS.bit_length())]
    return [ranks for ranks in powers if ranks <= min(gpus, MOST_RANKS) and _divides(ranks, need.heads)]


def _divides(ranks: int, heads: Sequence[int]) -> bool:
    """Attention heads must be divisible; fewer KV heads than ranks are repeated."""
    return all(count % ranks == 0 or ranks % count == 0 for count in heads)


def threads_each(cores: int, at_once: int) -> int:
    """Threads that compute, of one engine where ``at_once`` run side by side: one core of its share is for
    its other processes, where the share has more than one. vLLM's own default leaves one free as well."""
    share = cores // max(1, at_once)
    return max(1, share - 1)


def _memory_on_cores(need: Need) -> int:
    return round(need.weight_bytes * WEIGHTS_FACTOR) + need.kv_bytes + need.overhead


def _on_cores(machine: Machine, need: Need, busy: Sequence[Placed], at_once: int) -> Placed | None:
    memory, env = _memory_on_cores(need), need.env
    if memory > machine.memory_free:
        raise PlacementError(
            f"{need.name} needs about {memory / GIB:.1f} GiB of memory ({need.weight_bytes / GIB:.1f} for "
            f"weights, {need.kv_bytes / GIB:.1f} for the KV cache); {machine.memory_free / GIB:.1f} are free"
        )
    busy = [one for one in busy if not one.gpus]
    if memory + sum(one.memory for one in busy) > machine.memory_free:
        return None
    if any(name in env for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND")):
        own = env.get("OMP_NUM_THREADS", "")
        if busy and not (own.isdigit() and 0 < int(own) * (len(busy) + 1) <= machine.cores):
            return None  # its threads are all cores, or unknown: one after another
        return Placed(memory=memory, where="cores by engine.env")
    threads = threads_each(machine.cores, at_once)
    used = {core for one in busy for core in one.cores}
    free = {node: [core for core in cores if core not in used] for node, cores in machine.nodes.items()}
    node, cores = max(free.items(), key=lambda entry: (min(len(entry[1]), threads), -entry[0]))
    chosen = tuple((cores + [core for n, more in free.items() if n != node for core in more])[:threads])
    if not chosen and busy and len(busy) >= machine.cores:
        return None
    many = len(machine.nodes) > 1 and len(chosen) == threads
    bind = ",".join(map(str, chosen)) if many else "nobind"
    # On one node threads are not bound: the kernel moves them away from whoever else is busy there.
    added = {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": bind}
    text = f"{threads} core{'s' if threads > 1 else ''}" + (f" of node {node}" if many else "")
    return Placed(added, (), (), chosen, memory, text)


class Seats:
    """Places that engines take and give back while they come and go."""

    def __init__(self, machine: Machine, at_once: int) -> None:
        self._machine, self._at_once = machine, at_once
        self._busy: list[Placed] = []
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def take(self, need: Need) -> AsyncIterator[Placed]:
        """A place inside the block; waits while others leave no room. Raises PlacementError."""
        async with self._changed:
            while (placed := self._next(need)) is None:
                await self._changed.wait()
            self._busy.append(placed)
        try:
            yield placed
        finally:
            async with self._changed:
                self._busy.remove(placed)
                self._changed.notify_all()

    def _next(self, need: Need) -> Placed | None:
        if len(self._busy) >= self._at_once:
            return None
        placed = place(self._machine, need, self._busy, self._at_once)
        if placed is None and not self._busy:
            raise PlacementError(f"{need.name} fits nowhere on this machine")
        return placed
