"""What each target loads, exactly, so that a plan is refused before any work and not by the engine.

A target is vLLM 0.32 on one kind of processor. Its rules are data: per kind of scheme the kernels that
may take it, with the bits, group sizes and shapes they need; per KV-cache type the head sizes. Shapes
are of the fused matrix that one shard holds (q, k and v together; N outputs, K inputs).

Where the rules come from. They were read in vLLM 0.32's sources: ``compressed_tensors`` and its schemes,
``kernels/linear`` (which kernel takes a layer), ``fused_moe/oracle``, the attention backends. The CPU
ones with AVX-512, VNNI and AVX2 were then tried on the engine, and ``tests/e2e/test_matrix.py`` tries them
again. Of AMX some and of Hopper (an H100) most were tried, of the other GPUs **none was run**:
:attr:`~quantize.core.legality.Target.measured` lists which, for linear modules; of experts on AMX and on
GPUs none was. Where the sources leave a case open, the rule is the narrower one. Optional kernel packages
(Humming, Conch) are taken as absent. Blackwell stands for compute capability 10 and 12 together.

Head and embeddings. An output head with a matrix of its own is one more linear module: all kernels of a CPU
that were tried took it. Embeddings are looked up, not multiplied: the engine has one kernel for packed ones,
in Triton, which its CPU build lacks, and most architectures (Llama among them) do not name their embeddings
to it; so they stay at 16 bits, and so does a head that is the embeddings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from quantize.core.gpus import ask_gpus
from quantize.core.legality import ENGINE, LADDER, Kind, KvRule, Problem, Rule, Target
from quantize.core.schemes import KV_SCHEMES

__all__ = ["TARGETS", "Problem", "Target", "TargetError", "detect", "target"]


class TargetError(ValueError):
    """A target's name is not known, or this machine is none that is known."""


_W4A8 = "W4A8: inputs are rounded to int8 per token; set VLLM_CPU_INT4_W4A8=0 for 16-bit inputs"
_FP8_16 = "W8A16: the weights are turned back to 16 bits, inputs are not rounded"
_FP4_16 = "W4A16: inputs are not rounded"
_SATURATES = "sums of two products that overflow 16 bits, since it lacks VNNI: w8a8-r7 does not"
_SCALE_1 = "scale 1.0 for keys and values, since no scale is calibrated for it"
_SLOW = "unusable: it runs on a reference kernel, at 1-2 tokens/s on a model of 4 M parameters"
_UNTRIED = "its kernel was read in the sources, not run"
_BIG = "of no use: it takes the bytes of 8 bits per weight and has the loss of 4"

CPU_HEADS = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""The sizes that the CPU attention kernel is compiled for; the engine's own list lacks 48, which works."""

_ALL = frozenset((*LADDER, *KV_SCHEMES))
_INT4 = frozenset(name for name in LADDER if name.startswith("w4a16"))
_TRIED_ON_AMX = _INT4 - {"w4a16-g16", "w4a16-g16-asym"} | {
    "w8a8",
    "w8a8-asym",
    "fp8-dynamic",
    "auto",
    "fp8",
    "fp8_e5m2",
}
_TRIED_ON_AN_H100 = frozenset(
    (
        *("w4a16", "w4a16-asym", "w4a16-g128", "w4a16-g128-asym", "w4a16-g64"),
        *("w4a16-g64-asym", "w4a16-g32", "w4a16-g32-asym", "w8a16", "w8a16-g128"),
        *("w8a8", "w8a8-r7", "w8a8-asym", "fp8", "fp8-dynamic", "fp8-block", "fp8a16"),
        *("nvfp4", "nvfp4a16", "mxfp4"),
        *("auto", "fp8", "int8_per_token_head", "int4_per_token_head"),
    )
)


def _cpu(
    name: str,
    processor: str,
    weight_only: tuple[Rule, ...],
    int8: Rule,
    more: Mapping[Kind, tuple[Rule, ...]],
    experts: Mapping[Kind, tuple[Rule, ...]],
    fp8_kv: bool,
    refused: Mapping[str, str],
    measured: frozenset[str],
) -> Target:
    one_dnn = Rule("oneDNN")
    rules = {
        **({Kind.INT_WEIGHTS: weight_only} if weight_only else {}),
        Kind.INT8: (int8,),
        Kind.INT8_REDUCED: (replace(int8, computes=None, same_as=None if int8.same_as else "w8a8"),),
        Kind.INT8_ASYMMETRIC: (replace(one_dnn, computes=int8.computes, same_as=int8.same_as),),
        Kind.INT4_INT8: (Rule("Dynamic4bit", note=_BIG),),
        Kind.FP8_TOKEN: (Rule("ChannelWiseTorch", note=_SLOW),),
        **more,
    }
    fp8_heads = tuple(head for head in CPU_HEADS if head % 32 == 0)
    kv = {"auto": KvRule(CPU_HEADS)}
    if fp8_kv:
        kv |= {"fp8": KvRule(fp8_heads), "fp8_e5m2": KvRule(fp8_heads, computes=_SCALE_1)}
    wrong = "a CPU loads it and then answers wrongly (KL 1 nat per token, measured)"
    return Target(
        name,
        processor,
        rules,
        experts,
        kv,
        {
            Kind.FP8_TENSOR: f"{ENGINE} rescales such weights with an operation that its CPU build lacks",
            "int8_per_token_head": wrong,
            "int4_per_token_head": wrong,
            **refused,
        },
        measured=measured,
    )


def _cuda(
    name: str,
    processor: str,
    capability: int,
    kv: Mapping[str, KvRule],
    refused: Mapping[str, str],
    measured: frozenset[str] = frozenset(),
) -> Target:
    marlin = Rule("Marlin", bits=(4, 8), groups=(32, 64, 128), zero_points=(4,))
    machete = Rule("Machete", bits=(4, 8), groups=(64, 128), zero_points=(4, 8), k=64, n=128)
    triton = Rule("Triton", bits=(4,), groups=(32, 64, 128, 256), zero_points=(4,), n=8)
    cutlass, weights = Rule("CUTLASS"), Rule("Marlin")
    as16 = Rule("Marlin", computes=_FP8_16, same_as="fp8a16")
    blocks16 = Rule("Marlin", blocks=True, computes=_FP8_16, same_as="fp8a16")
    rules: dict[Kind, tuple[Rule, ...]] = {
        Kind.INT_WEIGHTS: (marlin, machete, triton) if capability == 90 else (marlin, triton),
        Kind.FP8_TENSOR: (cutlass if capability >= 89 else as16,),
        Kind.FP8_TOKEN: (cutlass if capability >= 89 else as16,),
        Kind.FP8_BLOCK: (Rule("block-scaled FP8", blocks=True) if capability >= 90 else blocks16,),
        Kind.FP8_WEIGHTS: (weights,),
        Kind.NVFP4_WEIGHTS: (weights,),
    }
    if capability < 100:
        rules[Kind.INT8] = rules[Kind.INT8_ASYMMETRIC] = (cutlass,)
        rules[Kind.INT8_REDUCED] = (replace(cutlass, same_as="w8a8"),)
        rules[Kind.NVFP4] = (Rule("Marlin", computes=_FP4_16, same_as="nvfp4a16"),)
        rules[Kind.MXFP4] = (Rule("Marlin", computes=_FP4_16),)
    else:
        rules[Kind.NVFP4] = rules[Kind.MXFP4] = (Rule("FP4 CUTLASS", k=32, n=32),)
    experts: dict[Kind, tuple[Rule, ...]] = {
        Kind.INT_WEIGHTS: (Rule("Marlin for experts", bits=(4, 8), groups=(32, 64, 128), k=64, n=128),)
    }
    if capability < 100:
        experts[Kind.INT8] = (Rule("Triton for experts", dynamic_only=True),)
    if capability >= 89:
        experts |= {Kind.FP8_TENSOR: (Rule("Triton for experts"),), Kind.FP8_TOKEN: (Rule("CUTLASS"),)}
    return Target(name, processor, rules, experts, kv, refused, measured=measured)


def _targets() -> dict[str, Target]:
    no_amx = "it needs AMX"
    amx = Rule(
        "int4 on AMX", bits=(4,), groups=(32, 64, 128), zero_points=(4,), n=32, k=32,
        wide=128, computes=_W4A8, unless=("VLLM_CPU_INT4_W4A8", "0"),
    )  # fmt: skip
    avx512 = Rule("CPUWNA16", bits=(4,), zero_points=(4,), n=32, k=32)
    block = Rule("FP8 blocks on AMX", blocks=True, computes=_FP8_16, note=_UNTRIED)
    experts = {
        Kind.INT_WEIGHTS: (
            Rule("int4 experts on AMX", bits=(4,), groups=(64, 128), per_channel=False, n=32, k=32),
        ),
        Kind.INT8: (Rule("int8 experts on AMX", n=32, k=32, dynamic_only=True),),
    }
    static_int8 = Rule("int8 on AMX", n=32, ignores_static=True)
    saturating = Rule("oneDNN", computes=_SATURATES, same_as="w8a8-r7")
    no_block: dict[str, str] = {Kind.FP8_BLOCK: no_amx}
    no_fp8_kv: dict[str, str] = {"fp8": "FP8 needs AVX-512 or AMX", "fp8_e5m2": "FP8 needs AVX-512 or AMX"}
    no_int4: dict[str, str] = {Kind.INT_WEIGHTS: "the int4 kernel is not in the engine's AVX2 build"}
    any_head = KvRule(multiple=8, least=8)
    heads = {"auto": any_head}
    scaled = {"int8_per_token_head": KvRule(least=32), "int4_per_token_head": KvRule((64, 128, 256))}
    # FlashInfer's: Triton's attention refuses E5M2 with an assertion (run on an H100 without FlashInfer).
    e5m2 = {"fp8_e5m2": KvRule((64, 128, 256), computes=_SCALE_1)}
    fp8 = {"fp8": KvRule(least=32), **e5m2}
    ampere = {"fp8": "E4M3 needs compute capability 8.9; Ampere has fp8_e5m2 alone"}
    no_int8 = "INT8 matrices are not supported from compute capability 10 on; use FP8"
    int8_kinds = (Kind.INT8, Kind.INT8_REDUCED, Kind.INT8_ASYMMETRIC)
    blackwell: dict[str, str] = dict.fromkeys(int8_kinds, no_int8)
    made = (
        _cpu("vllm-cpu-amx", "a CPU with AMX", (amx,), static_int8, {Kind.FP8_BLOCK: (block,)}, experts,
             True, {}, _TRIED_ON_AMX),
        _cpu("vllm-cpu-vnni", "a CPU with AVX-512 and VNNI", (avx512,), Rule("oneDNN"), {}, {}, True,
             no_block, _ALL),
        _cpu("vllm-cpu-avx512", "a CPU with AVX-512 only", (avx512,), saturating, {}, {}, True, no_block,
             _ALL),
        _cpu("vllm-cpu-avx2", "a CPU with AVX2", (), saturating, {}, {}, False,
             no_block | no_fp8_kv | no_int4, _ALL),
        _cuda("vllm-cuda-ampere", "an Ampere GPU (8.0-8.7)", 80, heads | e5m2 | scaled, ampere),
        _cuda("vllm-cuda-ada", "an Ada GPU (8.9)", 89, heads | fp8 | scaled, {}),
        _cuda("vllm-cuda-hopper", "a Hopper GPU (9.0)", 90, heads | fp8 | scaled, {},
              _TRIED_ON_AN_H100),
        _cuda("vllm-cuda-blackwell", "a Blackwell GPU (10, 12)", 100, heads | fp8 | scaled, blackwell),
    )  # fmt: skip
    return {target.name: target for target in made}


TARGETS: Mapping[str, Target] = _targets()


def target(name: str) -> Target:
    """The target of that name. ``vllm-cpu`` and ``vllm-cuda`` are this machine's. Raises TargetError."""
    if name in ("vllm-cpu", "vllm-cuda"):
        found = detect_cuda() if name == "vllm-cuda" else detect_cpu()
        if found is None:
            known = ", ".join(known for known in TARGETS if known.startswith(name))
            raise TargetError(f"{name}: this machine has none that is known; name one of {known}")
        return TARGETS[found]
    if name not in TARGETS:
        raise TargetError(
            f"unknown target {name!r}; known: {', '.join(TARGETS)}, "
            "and vllm-cpu and vllm-cuda for this machine's"
        )
    return TARGETS[name]


def detect() -> str:
    """The target that this machine is: its GPUs' if it has any, else its CPU's.

    Raises TargetError where it is none, and where there are GPUs without rules: engines would run on them,
    so the processor's rules would be others'.
    """
    found = detect_cuda() or detect_cpu()
    if found is None:
        raise TargetError(f"this machine is no known target; name one of {', '.join(TARGETS)}")
    return found


def detect_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """By the flags that the engine itself asks for."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    names = {
        "amx_tile": "vllm-cpu-amx",
        "avx512_vnni": "vllm-cpu-vnni",
        "avx512f": "vllm-cpu-avx512",
        "avx2": "vllm-cpu-avx2",
    }
    return next((name for flag, name in names.items() if flag in flags), None)


_GENERATIONS = {8: "vllm-cuda-ampere", 9: "vllm-cuda-hopper", 10: "vllm-cuda-blackwell"}
_GENERATIONS |= {12: _GENERATIONS[10]}
_WITHOUT_RULES = {7: "Volta or Turing", 6: "Pascal", 5: "Maxwell"}


def detect_cuda(command: Sequence[str] | None = None) -> str | None:
    """By the GPUs' compute capability; None without a GPU, or where CUDA_VISIBLE_DEVICES hides them all.
    ``command`` stands for ``nvidia-smi``.

    Raises TargetError for GPUs that there are no rules for, or of several kinds, and GpuError.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip() in ("", "-1"):
        return None
    found = {_capability_target(row[0]) for row in ask_gpus(["compute_cap"], command)}
    if len(found) > 1:
        raise TargetError(
            f"this machine has GPUs of several kinds ({', '.join(sorted(found))}); name the target that "
            "engines are to run on"
        )
    return next(iter(found), None)


def _capability_target(text: str) -> str:
    known = ", ".join(name for name in TARGETS if name.startswith("vllm-cuda"))
    try:
        major, minor = map(int, text.split("."))
    except ValueError:
        raise TargetError(f"nvidia-smi gives {text!r} as compute capability; name one of {known}") from None
    if (major, minor) == (8, 9):
        return "vllm-cuda-ada"
    if major not in _GENERATIONS:
        kind = f" ({_WITHOUT_RULES[major]})" if major in _WITHOUT_RULES else ""
        raise TargetError(
            f"this machine's GPU has compute capability {text}{kind}, for which there are no rules of what "
            f"the engine loads; there are some for {known}, and vllm-cpu for an engine on the processor. "
            "Name one as the target to plan for it"
        )
    return _GENERATIONS[major]
