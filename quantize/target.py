"""What each target can load, exactly, and what it computes instead where it does not say so.

Version 1 of the rules, for vLLM 0.32. The CPU targets' rules were tried on the engine (the matrix test
does so again on every machine it runs on); what was tried where is said in each rule's note. The CUDA
targets' rules are read from vLLM's source (compressed-tensors schemes, Marlin, Machete, CUTLASS and
attention back ends) and were not run.

A rule that is missing means: refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quantize.modules import Group, Linear, Modules
from quantize.plan import Plan
from quantize.schemes import BLOCK, Scheme, kv_scheme, scheme

RULES_VERSION = 1
ENGINE = "vLLM 0.32"
ROW_PARALLEL = ("o_proj", "down_proj", "w2", "fc2", "out_proj", "dense_4h_to_h")
"""Modules whose inputs (K), not outputs, are split between tensor-parallel ranks."""


class TargetError(ValueError):
    """A target's name is not known. The text lists the known ones."""


@dataclass(frozen=True)
class Problem:
    """Why something cannot be loaded: where, what is there, and what to do."""

    place: str
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}; {self.fix}"


@dataclass(frozen=True)
class Rule:
    """What a target asks of a scheme's family. Sizes are of one tensor-parallel shard."""

    bits: frozenset[int] = frozenset({8})
    groups: frozenset[int] | None = None
    """Legal group sizes; None for any multiple of ``group_multiple``."""
    group_multiple: int = 32
    n_multiple: int = 1
    k_multiple: int = 1
    wide_group_multiple: int = 1
    """K, and the group size, for groups above 128 inputs and for one scale per channel."""
    computes: str | None = None
    """What the engine computes instead of what the checkpoint says."""
    candidate: bool = True
    """Whether a planner should consider it; a legal scheme may be pointless or unusable."""
    note: str = ""


@dataclass(frozen=True)
class Target:
    """Where a variant is to be loaded."""

    name: str
    device: str
    """``cpu`` or ``cuda``."""
    text: str
    rules: Mapping[str, Rule]
    refusals: Mapping[str, str]
    """Family to the reason why it is refused."""
    kv: Mapping[str, str | None]
    """KV-cache scheme to None, or to the reason why it is refused."""
    head_sizes: frozenset[int] = field(default_factory=frozenset)
    """Legal attention head sizes; empty for any."""
    ladder: tuple[str, ...] = ()
    """Schemes that a planner considers, where they are legal."""
    engine: str = ENGINE

    def problems(self, how: Scheme, group: Group, tensor_parallel: int = 1) -> tuple[Problem, ...]:
        """Why ``group`` cannot be loaded at scheme ``how``; empty if it can."""
        if how.weights is None:
            return ()
        kind = family(how)
        if (rule := self.rules.get(kind)) is None:
            why = self.refusals.get(kind, f"{self.engine} has no kernel for it")
            return (Problem(group.name, f"{self.name} refuses {how.name}: {why}", self._instead()),)
        found = []
        if group.kind.endswith("experts"):
            reason = f"{how.name} of experts is not made here"
            fix = "quantize it with a tool for mixtures of experts and register the result"
            found.append(Problem(group.name, reason, fix))
        if how.weights.bits not in rule.bits:
            legal = " or ".join(str(bits) for bits in sorted(rule.bits))
            reason = f"{how.name} has {how.weights.bits}-bit weights, {self.name} loads {legal} bits"
            found.append(Problem(group.name, reason, self._instead()))
        for member in group.members:
            found += self._shape_problems(how, rule, member, tensor_parallel)
        return tuple(found)

    def _instead(self) -> str:
        return f"use one of {', '.join(name for name in self.ladder if name != 'bf16')}"

    def _shape_problems(self, how: Scheme, rule: Rule, member: Linear, ranks: int) -> list[Problem]:
        n, k, found = member.out_features, member.in_features, []
        split = "K" if member.name.rpartition(".")[2] in ROW_PARALLEL else "N"
        whole = k if split == "K" else n
        if whole % ranks:
            fix = f"choose a tensor-parallel size that divides {whole}"
            return [Problem(member.name, f"{split}={whole} does not split over {ranks} ranks", fix)]
        n, k = (n, k // ranks) if split == "K" else (n // ranks, k)
        keep = "keep the module at bf16"
        for name, size, multiple in (("N", n, rule.n_multiple), ("K", k, rule.k_multiple)):
            if size % multiple:
                shard = f" in each of {ranks} shards" if ranks > 1 else ""
                reason = f"{name}={size}{shard}, {how.name} on {self.name} needs a multiple of {multiple}"
                found.append(Problem(member.name, reason, keep))
        group = how.weights.group_size if how.weights and how.weights.strategy == "group" else None
        if how.weights and how.weights.kind == "int" and how.activations is None:
            if group and k % group:
                reason = f"K={k} is not a multiple of the group size {group}"
                found.append(Problem(member.name, reason, "choose a group size that divides K"))
            if group and rule.groups is not None and group not in rule.groups:
                legal = ", ".join(str(size) for size in sorted(rule.groups))
                reason = f"group size {group}, {self.name} loads {legal} or one scale per channel"
                found.append(Problem(member.name, reason, "choose one of those"))
            elif group and group % rule.group_multiple:
                reason = f"group size {group}, {self.name} needs a multiple of {rule.group_multiple}"
                found.append(Problem(member.name, reason, "choose 32, 64 or 128"))
            wide = rule.wide_group_multiple
            if (group or k) > BLOCK and (k % wide or (group or wide) % wide):
                reason = f"K={k} with {f'groups of {group}' if group else 'one scale per channel'}, "
                reason += f"{self.name} needs multiples of {wide} above groups of {BLOCK}"
                found.append(Problem(member.name, reason, "choose group size 32, 64 or 128"))
        return found

    def legal(self, how: Scheme, group: Group, tensor_parallel: int = 1) -> bool:
        return not self.problems(how, group, tensor_parallel)

    def kv_problems(self, kv: str, head_dim: int) -> tuple[Problem, ...]:
        """Why a KV cache of that scheme, with heads of ``head_dim`` values, cannot be used."""
        found = []
        kv_scheme(kv)
        if kv not in self.kv:
            found.append(Problem("KV cache", f"{self.name} does not know {kv}", "use auto or fp8"))
        elif (reason := self.kv[kv]) is not None:
            found.append(Problem("KV cache", f"{self.name} refuses {kv}: {reason}", "use auto or fp8"))
        if self.head_sizes and head_dim not in self.head_sizes:
            legal = ", ".join(str(size) for size in sorted(self.head_sizes))
            reason = f"head size {head_dim}, the attention kernels of {self.name} have {legal}"
            found.append(Problem("KV cache", reason, "use another target"))
        if self.device == "cpu" and kv.startswith("fp8") and head_dim % 32:
            reason = f"head size {head_dim}, an FP8 cache on a CPU needs a multiple of 32"
            found.append(Problem("KV cache", reason, "use auto"))
        return tuple(found)

    def computes(self, how: Scheme, env: Mapping[str, str] | None = None) -> str | None:
        """What the engine computes instead of ``how``, or None if it does as the checkpoint says."""
        if how.weights is None or (rule := self.rules.get(family(how))) is None:
            return None
        settings = os.environ if env is None else env
        if rule.computes and "VLLM_CPU_INT4_W4A8=0" in rule.computes:
            return None if settings.get("VLLM_CPU_INT4_W4A8") == "0" else rule.computes
        return None if how.range_bits else rule.computes

    def candidates(self, group: Group, tensor_parallel: int = 1) -> tuple[str, ...]:
        """Schemes worth planning over that this group can have, ``bf16`` last."""
        return tuple(
            name
            for name in self.ladder
            if self.legal(scheme(name), group, tensor_parallel)
            and (name == "bf16" or self.rules[family(scheme(name))].candidate)
        )

    def check_plan(
        self, plan: Plan, modules: Modules, head_dim: int, tensor_parallel: int = 1
    ) -> tuple[Problem, ...]:
        """Everything that keeps ``plan`` from loading; empty if nothing does."""
        found: list[Problem] = []
        names = {group.name for group in modules}
        for name in sorted(names - plan.groups.keys()):
            found.append(Problem(name, "the plan gives it no scheme", "give it one, or bf16"))
        for name in sorted(plan.groups.keys() - names):
            found.append(Problem(name, "the model has no such module group", "remove it from the plan"))
        for group in modules:
            if group.name in plan.groups:
                found += self.problems(scheme(plan.groups[group.name]), group, tensor_parallel)
        return (*found, *self.kv_problems(plan.kv, head_dim))


def family(how: Scheme) -> str:
    """The rule that a scheme falls under."""
    w, a = how.weights, how.activations
    if w is None:
        return "bf16"
    if w.kind == "float":
        if w.bits == 4:
            return how.name
        if a is None:
            return "fp8a16"
        return {"block": "fp8-block", "channel": "fp8-dynamic"}.get(w.strategy, "fp8")
    if a is None:
        return "wNa16" if w.symmetric else "wNa16-asym"
    if w.bits != 8 and how.range_bits is None:
        return "w4a8" if w.bits == 4 else "wNa8"
    if not w.symmetric:
        return "w8-asym-a8"
    if a.dynamic is not True:
        return "w8a8-static"
    return "w8a8" if a.symmetric else "w8a8-asym"


def _cpu(name: str, text: str, amx: bool, vnni: bool) -> Target:
    four = frozenset({4})
    instead = "INT8 inputs (W4A8): set VLLM_CPU_INT4_W4A8=0 for 16-bit inputs" if amx else None
    packed = Rule(
        bits=four,
        n_multiple=32,
        k_multiple=32,
        wide_group_multiple=128 if amx else 1,
        computes=instead,
        note="tried on AMX and on AVX-512",
    )
    saturating = None if vnni else "sums of products saturated at 16 bits: use w8a8-r7"
    integers = Rule(n_multiple=32 if amx else 1, computes=saturating, note="tried on AMX and on AVX-512")
    static = Rule(
        n_multiple=32 if amx else 1,
        computes="inputs quantized per token at run time, static scales are ignored" if amx else saturating,
        candidate=False,
    )
    rules = {
        "wNa16": packed,
        "wNa16-asym": packed,
        "w8a8": integers,
        "w8a8-asym": Rule(computes=saturating, candidate=False, note="oneDNN"),
        "w8a8-static": static,
        "w4a8": Rule(bits=four, candidate=False, note="stored a byte per weight: nothing is gained"),
        "fp8-dynamic": Rule(candidate=False, note="a reference path: one or two tokens per second"),
    }
    amx_kernel = "the kernel needs AMX"
    refusals = {
        "fp8a16": f"{ENGINE} has no CPU kernel for FP8 weights with 16-bit inputs per channel",
        "nvfp4": "4-bit floats need a GPU",
        "nvfp4a16": "4-bit floats need a GPU",
        "mxfp4": "4-bit floats need a GPU",
        "w8-asym-a8": "INT8 weights must be symmetric",
        "wNa8": "with INT8 inputs, weights must have 4 or 8 bits",
    }
    if amx:
        rules["fp8"] = Rule(n_multiple=32, k_multiple=128, computes="16-bit inputs (W8A16)")
        rules["fp8-block"] = Rule(n_multiple=BLOCK, k_multiple=BLOCK, computes="16-bit inputs (W8A16)")
    else:
        refusals |= {"fp8": amx_kernel, "fp8-block": amx_kernel}
    silent = "the CPU engine takes the flag and then answers nonsense (KL 0.6 nats per token, measured)"
    return Target(
        name=name,
        device="cpu",
        text=text,
        rules=rules,
        refusals=refusals,
        kv={
            "auto": None,
            "fp8": None,
            "fp8_e5m2": None,
            "int8_per_token_head": silent,
            "int4_per_token_head": silent,
        },
        head_sizes=frozenset({32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512}),
        ladder=(
            *("w4a16-g128", "w4a16-g64", "w4a16-g32", "w4a16-g128-asym", "w4a16-g64-asym"),
            *(("w8a8",) if vnni else ("w8a8-r7",)),
            *(("fp8",) if amx else ()),
            "bf16",
        ),
    )


def _cuda(name: str, text: str, capability: int) -> Target:
    packed = Rule(
        bits=frozenset({4, 8}), groups=frozenset({32, 64, 128}), n_multiple=64, k_multiple=128, note="Marlin"
    )
    rules = {
        "wNa16": packed,
        "wNa16-asym": Rule(
            bits=frozenset({4}),
            groups=frozenset({32, 64, 128}),
            n_multiple=64,
            k_multiple=128,
            note="Marlin",
        ),
        "fp8a16": Rule(n_multiple=64, k_multiple=128, note="Marlin"),
        "nvfp4a16": Rule(bits=frozenset({4}), n_multiple=64, k_multiple=128, note="Marlin"),
    }
    refusals = {
        "w4a8": "W4A8 with INT8 inputs has no CUDA kernel",
        "w8-asym-a8": "INT8 weights must be symmetric",
        "wNa8": "with INT8 inputs, weights must have 8 bits",
    }
    eight = Rule(n_multiple=16, k_multiple=16, note="CUTLASS")
    if capability < 100:
        rules |= {
            "w8a8": eight,
            "w8a8-asym": eight,
            "w8a8-static": Rule(n_multiple=16, k_multiple=16, candidate=False),
        }
    else:
        refusals |= dict.fromkeys(("w8a8", "w8a8-asym", "w8a8-static"), "CUTLASS has no INT8 on Blackwell")
    weight_only = "16-bit inputs (W8A16 by Marlin)" if capability < 89 else None
    marlin = Rule(n_multiple=64, k_multiple=128, computes=weight_only)
    rules |= dict.fromkeys(("fp8", "fp8-dynamic"), marlin if weight_only else eight)
    rules["fp8-block"] = Rule(n_multiple=BLOCK, k_multiple=BLOCK, computes=weight_only)
    emulated = None if capability >= 100 else "16-bit inputs (W4A16 by Marlin)"
    for kind in ("nvfp4", "mxfp4"):
        rules[kind] = Rule(
            bits=frozenset({4}), n_multiple=64, k_multiple=128, computes=emulated, candidate=emulated is None
        )
    return Target(
        name=name,
        device="cuda",
        text=text,
        rules=rules,
        refusals=refusals,
        kv={
            "auto": None,
            "fp8": None if capability >= 89 else "E4M3 caches need compute capability 8.9",
            "fp8_e5m2": None,
            "int8_per_token_head": None,
            "int4_per_token_head": None,
        },
        ladder=(
            *("w4a16-g128", "w4a16-g64", "w4a16-g32", "w4a16-g128-asym", "nvfp4", "w8a16-g128", "w8a8"),
            *("fp8-dynamic", "bf16"),
        ),
    )


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        _cpu("vllm-cpu-amx", "CPU with AMX (Sapphire Rapids and later)", amx=True, vnni=True),
        _cpu("vllm-cpu-vnni", "CPU with AVX-512 and VNNI", amx=False, vnni=True),
        _cpu("vllm-cpu-avx512", "CPU with AVX-512 only", amx=False, vnni=False),
        _cpu("vllm-cpu-avx2", "CPU with AVX2", amx=False, vnni=False),
        _cuda("vllm-cuda-ampere", "NVIDIA Ampere (8.0, 8.6)", 80),
        _cuda("vllm-cuda-ada", "NVIDIA Ada (8.9)", 89),
        _cuda("vllm-cuda-hopper", "NVIDIA Hopper (9.0)", 90),
        _cuda("vllm-cuda-blackwell", "NVIDIA Blackwell (10.0, 12.0)", 100),
    )
}


def detect(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU target of this machine, by the instructions that its processor lists."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    if "amx_tile" in flags and "amx_int8" in flags:
        return "vllm-cpu-amx"
    if "avx512f" in flags:
        return "vllm-cpu-vnni" if "avx512_vnni" in flags else "vllm-cpu-avx512"
    return "vllm-cpu-vnni" if "avx_vnni" in flags else "vllm-cpu-avx2"


def target(name: str | None = None) -> Target:
    """The target of that name; ``vllm-cpu`` (or None) is this machine's processor. Raises TargetError."""
    if name in (None, "vllm-cpu"):
        name = detect()
    if name not in TARGETS:
        raise TargetError(f"unknown target {name!r}; known: vllm-cpu (this machine), {', '.join(TARGETS)}")
    return TARGETS[name]
