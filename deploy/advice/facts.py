"""What the rules of advice go by: which precisions fit where, and which ways of training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from deploy.advice.hardware import Hardware
from deploy.placement import (
    CPU_OVERHEAD,
    GIB,
    GPU_OVERHEAD,
    Need,
    PlacementError,
    place,
    taken_by,
)
from quantize.check_costs import size
from quantize.core.legality import Target
from quantize.core.plan import Plan, uniform
from quantize.core.recipes import RECIPES
from quantize.core.shape import Shape
from quantize.core.training_memory import LENGTH, SEQUENCES, TrainingMemory, full_memory, lora_memory

Goal = Literal["deploy", "finetune"]
GGUF_BITS: Mapping[str, float] = {
    "q8_0": 8.5,
    "q6_k": 6.5625,
    "q5_k_m": 5.69,
    "q4_k_m": 4.85,
    "q3_k_m": 3.91,
    "q2_k": 3.0,
}
"""Type to bits of a weight, embeddings included; of mixed types about (llama.cpp)."""
FEW_BITS = ("q3_k_m", "q2_k")
"""Types below 4 bits."""
EDGE_OVERHEAD = GIB // 2
"""Beside weights and KV cache: llama.cpp's buffers."""
KV_BITS: Mapping[int, tuple[str, ...]] = {
    16: ("auto",),
    8: ("fp8", "int8_per_token_head"),
    4: ("int4_per_token_head",),
}
"""Bits of a KV cache to the types that may be it, the first that a target serves is taken."""
BATCHES = (SEQUENCES * LENGTH, LENGTH, LENGTH // 4)
"""Tokens of a micro-batch, the first that fits is taken."""
SMALLEST_4 = ("w4a16-g128", "w4a16-g64", "w4a16-g64-asym", "w4a16-g32-asym", "w4a16-g32")


@dataclass(frozen=True)
class Wish:
    """What is asked for. ``loss`` is the share of right answers, in per cent, that may be lost."""

    goal: Goal
    loss: float
    context: int
    concurrency: int
    training: Hardware | None = None
    """What there is to train on; None for nothing."""


@dataclass(frozen=True)
class Option:
    """One precision on the hardware. ``gpus`` share it; ``problem`` is why it does not work there."""

    bits: int
    kv_bits: int
    scheme: str
    kv: str
    weight_bytes: int
    kv_bytes: int
    taken: int
    """Bytes in all, what the engine takes beside both included."""
    gpus: int = 0
    problem: str = ""

    @property
    def fits(self) -> bool:
        return not self.problem


@dataclass(frozen=True)
class Facts:
    """A model, hardware and a wish, with what follows from them."""

    shape: Shape
    hardware: Hardware
    wish: Wish
    measured: Mapping[str, str] = field(default_factory=dict)
    """What cards of this model say: variant to a sentence."""
    failed: frozenset[int] = frozenset()
    """Weight bits of which every measured variant failed for every role."""
    proven: frozenset[int] = frozenset()
    """Weight bits of which a measured variant passed for some role: there is none to make."""

    @cached_property
    def options(self) -> Mapping[tuple[int, int], Option]:
        """By bits of weights and of the KV cache."""
        if self.hardware.target is None:
            return {}
        pairs = [(bits, kv_bits) for bits in (16, 8, 4) for kv_bits in KV_BITS]
        return {pair: self._option(*pair, self.hardware.target) for pair in pairs}

    def fits(self, bits: int, kv_bits: int = 16) -> bool:
        """Whether it works there, and no card says that such variants failed."""
        found = self.options.get((bits, kv_bits))
        return found is not None and found.fits and bits not in self.failed

    def _option(self, bits: int, kv_bits: int, where: Target) -> Option:
        shape = self.shape
        plan = self.plan(bits, where)
        kv = next((kv for kv in KV_BITS[kv_bits] if not where.kv_problems(kv, shape.head_dim)), "")
        weight_bytes = plan.weight_bytes(shape.modules)
        kv_bytes = self.kv_bytes(kv or KV_BITS[kv_bits][0])
        need = self.need(weight_bytes, kv_bytes, kv or "auto")
        made = Option(bits, kv_bits, plan.describe(), kv, weight_bytes, kv_bytes, taken_by(need))
        if not kv:
            problem = str(where.kv_problems(KV_BITS[kv_bits][0], shape.head_dim)[0])
            return Option(**{**vars(made), "problem": problem})
        try:
            placed = place(self.hardware.machine, need, [], 1)
        except PlacementError as error:
            return Option(**{**vars(made), "problem": str(error)})
        ranks = max(1, len(placed.gpus)) if placed else 1
        found = where.check_plan(plan, shape.modules, shape.head_dim, ranks)
        problem = f"{where.name} does not serve it: {found[0]}" if found else ""
        return Option(
            **{**vars(made), "gpus": ranks if self.hardware.machine.gpus else 0, "problem": problem}
        )

    def replicas(self, option: Option) -> int:
        """Engines that the hardware holds side by side, each with the whole KV cache."""
        if not option.fits:
            return 0
        if option.gpus:
            return len(self.hardware.machine.gpus) // option.gpus
        return max(1, self.hardware.machine.memory_free // option.taken)

    def plan(self, bits: int, where: Target) -> Plan:
        """The plan that is usual at so many bits of weights on a target."""
        if bits == 16:
            return uniform(self.shape.modules, "bf16")
        return RECIPES[self.recipe(bits, where)].plan(self.shape.modules, where)

    def recipe(self, bits: int, where: Target) -> str:
        """FP8 where the target computes it itself, on a GPU; else integers."""
        if bits == 4:
            return "int4"
        return "fp8" if where.name.startswith("vllm-cuda") and not RECIPES["fp8"].unsuited(where) else "int8"

    def need(self, weight_bytes: int, kv_bytes: int, kv: str) -> Need:
        shape, wish = self.shape, self.wish
        return Need(
            name=shape.name,
            weight_bytes=weight_bytes,
            kv_bytes=kv_bytes,
            heads=(shape.heads, shape.kv_heads),
            token_bytes=shape.kv_bytes_per_token(kv),
            context=wish.context,
            kv_dtype=kv,
        )

    def kv_bytes(self, kv: str = "auto") -> int:
        """Of all requests' contexts together; on a CPU a whole number of GiB, as its engine takes."""
        exact = self.shape.kv_bytes_per_token(kv) * self.wish.context * self.wish.concurrency
        return -(-exact // GIB) * GIB if self.hardware.kind == "cpu" else exact

    @cached_property
    def least_bytes(self) -> int | None:
        """Weights of the smallest uniform 4-bit variant that the target serves; None where it serves none."""
        where, modules = self.hardware.target, self.shape.modules
        plans = [uniform(modules, name) for name in SMALLEST_4]
        legal = [one for one in plans if where and not where.check_plan(one, modules, self.shape.head_dim)]
        return min((one.weight_bytes(modules) for one in legal), default=None)

    def room(self, kv: str = "auto") -> int:
        """Bytes of weights that fit beside the KV cache that is wanted; 0 where none do."""
        low, high = 0, 4 * self.shape.parameters + GIB
        kv_bytes = self.kv_bytes(kv)
        while high - low > (1 << 20):
            middle = (low + high) // 2
            low, high = (middle, high) if self._holds(middle, kv_bytes, kv) else (low, middle)
        return low

    def _holds(self, weight_bytes: int, kv_bytes: int, kv: str) -> bool:
        try:
            return place(self.hardware.machine, self.need(weight_bytes, kv_bytes, kv), [], 1) is not None
        except PlacementError:
            return False

    def bits_within(self, weight_bytes: int) -> float:
        """Bits of a weight in blocks, scales included, with which all weights take so many bytes; all else is
        at 16."""
        bits = 8 * (weight_bytes - self.shape.modules.other_bytes) / self.shape.weights
        return math.floor(bits * 20) / 20

    @cached_property
    def small_kv(self) -> str:
        """The 8-bit type of the KV cache that the target serves; empty where it has none."""
        found = self.options.get((16, 8))
        return found.kv if found else ""

    def planned(self, kv: str = "auto") -> bool:
        """Whether a mixture of 4 bits and more fits."""
        least = self.least_bytes
        return bool(kv) and least is not None and 4 not in self.failed and self.room(kv) >= least

    @cached_property
    def gguf(self) -> str | None:
        """The largest GGUF type that fits beside the KV cache."""
        left = self.hardware.memory - self.kv_bytes() - EDGE_OVERHEAD
        return next((one for one in GGUF_BITS if self.gguf_bytes(one) <= left), None)

    def gguf_bytes(self, kind: str) -> int:
        return round(self.shape.parameters * GGUF_BITS[kind] / 8)

    @cached_property
    def device(self) -> int:
        """Free bytes of the one device that is trained on."""
        if (where := self.wish.training) is None:
            return 0
        return max((gpu.free for gpu in where.machine.gpus), default=where.machine.memory_free)

    @property
    def training_overhead(self) -> int:
        where = self.wish.training or self.hardware
        return GPU_OVERHEAD if where.machine.gpus else CPU_OVERHEAD

    def training(self, way: str) -> TrainingMemory:
        """``full``, ``lora`` or ``qlora``, in the largest micro-batch that fits, else the smallest."""
        made = {
            tokens: full_memory(self.shape, tokens=tokens)
            if way == "full"
            else lora_memory(self.shape, tokens=tokens, quantized=way == "qlora")
            for tokens in BATCHES
        }
        left = self.device - self.training_overhead
        return next((one for one in made.values() if one.total <= left), made[BATCHES[-1]])

    def trains(self, way: str) -> bool:
        """Whether there is memory for it, and the model is one that is trained here."""
        return not self.shape.has_experts and self.training(way).total + self.training_overhead <= self.device

    @cached_property
    def words(self) -> Mapping[str, str]:
        """What reasons are written with."""
        wish, shape = self.wish, self.shape
        options = {f"w{bits}kv{kv}": size(one.taken) for (bits, kv), one in self.options.items()}
        here = self.hardware
        return {
            **options,
            "model": shape.name,
            "hardware": here.name,
            "memory": size(here.memory),
            "target": here.target.name if here.target else "llama.cpp",
            "eight": self.recipe(8, here.target) if here.target else "q8_0",
            "small_kv": self.small_kv or "8-bit",
            "loss": f"{wish.loss:g} %",
            "least": size(self.least_bytes or 2 * shape.parameters),
            "room": size(self.room()) if here.target else size(here.memory),
            "room8": size(self.room(self.small_kv)) if self.small_kv else "0",
            "bits": f"{self.bits_within(self.room()):.2f}" if here.target else "",
            "bits8": f"{self.bits_within(self.room(self.small_kv)):.2f}" if self.small_kv else "",
            "kv": size(self.kv_bytes()),
            "tokens": f"{wish.context:,} x {wish.concurrency:,}",
            "gguf": self.gguf or "none",
            "device": size(self.device),
            **{
                way: size(self.training(way).total + self.training_overhead)
                for way in ("full", "lora", "qlora")
            },
        }
