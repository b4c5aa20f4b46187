"""Names of schemes and methods say what is stored and how; bytes are exact."""

from __future__ import annotations

import re

import pytest

from quantize.core.methods import MethodError, parse_method
from quantize.core.modules import Group, Linear, Modules
from quantize.core.plan import Plan, uniform
from quantize.core.quantization_config import config_groups, pattern
from quantize.core.schemes import SchemeError, kv_scheme, scheme


@pytest.mark.parametrize(
    ("name", "n", "k", "stored"),
    [
        ("bf16", 256, 768, 256 * 768 * 2),
        # packed words, a bfloat16 scale per group, the shape
        ("w4a16-g128", 256, 768, 256 * 768 // 2 + 256 * 6 * 2 + 16),
        ("w4a16", 256, 768, 256 * 768 // 2 + 256 * 2 + 16),
        # zero points of 4 bits, packed along the outputs
        ("w4a16-g64-asym", 256, 768, 256 * 768 // 2 + 256 * 12 * 2 + 16 + 256 // 8 * 12 * 4),
        ("w8a8", 256, 768, 256 * 768 + 256 * 2),
        ("w8a8-r7", 256, 768, 256 * 768 + 256 * 2),
        ("w8a8-static", 256, 768, 256 * 768 + 256 * 2 + 2),
        # llm-compressor stores 4-bit weights with 8-bit inputs a byte each
        ("w4a8-g128", 256, 768, 256 * 768 + 256 * 6 * 2),
        ("w3a16-g128", 256, 768, 256 * 72 * 4 + 256 * 6 * 2 + 16),
    ],
)
def test_bytes_are_those_that_are_stored(name: str, n: int, k: int, stored: int) -> None:
    assert scheme(name).stored_bytes(n, k) == stored


def test_an_unknown_scheme_lists_the_known() -> None:
    with pytest.raises(SchemeError, match=r"unknown scheme 'int4'; known: bf16, w8a8, .*w4a16-g128"):
        scheme("int4")
    with pytest.raises(SchemeError, match="unknown KV-cache scheme 'fp4'; known: auto, fp8"):
        kv_scheme("fp4")


@pytest.mark.parametrize(
    ("name", "transforms", "solver", "observer"),
    [
        ("rtn", (), "rtn", "memoryless_minmax"),
        ("imatrix", (), "imatrix", "imatrix_mse"),
        ("imatrix+gptq", (), "gptq", "imatrix_mse"),
        ("awq", ("awq",), "rtn", "memoryless_minmax"),
        ("smoothquant", ("smoothquant",), "gptq", "memoryless_minmax"),
        ("rotation+imatrix+gptq", ("rotation",), "gptq", "imatrix_mse"),
    ],
)
def test_a_method_is_words_joined(name: str, transforms: tuple[str, ...], solver: str, observer: str) -> None:
    found = parse_method(name)
    assert (found.transforms, found.solver, found.observer) == (transforms, solver, observer)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gtpq", "unknown method 'gtpq'"),
        ("gptq+awq", "transforms come first"),
        ("gptq+gptq", "each word once"),
        ("gptq+rtn", "the first must be imatrix or mse, the last gptq"),
    ],
)
def test_a_method_that_makes_no_sense_is_refused(name: str, sentence: str) -> None:
    with pytest.raises(MethodError, match=sentence):
        parse_method(name)


QKV = Group(
    "model.layers.1.self_attn.qkv_proj",
    "self_attn.qkv_proj",
    1,
    tuple(Linear(f"model.layers.1.self_attn.{name}_proj", 256, 256) for name in "qkv"),
)
DOWN = Group(
    "model.layers.1.mlp.down_proj", "mlp.down_proj", 1, (Linear("model.layers.1.mlp.down_proj", 256, 768),)
)


def test_patterns_match_the_members_and_the_fused_name_of_their_own_layer_alone() -> None:
    matches = re.compile(pattern(QKV).removeprefix("re:")).match
    for name in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
        assert matches(f"model.layers.1.self_attn.{name}")
        assert matches(f"language_model.model.layers.1.self_attn.{name}")
    for name in ("layers.1.self_attn.o_proj", "layers.11.self_attn.q_proj", "layers.0.self_attn.q_proj"):
        assert not matches(f"model.{name}")


def test_a_mixed_plan_has_a_config_group_per_scheme_and_ignores_what_stays() -> None:
    modules = Modules((QKV, DOWN), other_bytes=0)
    plan = Plan(groups={QKV.name: "w8a8-r7", DOWN.name: "bf16"})
    groups, ignored = config_groups(plan, modules, "memoryless_minmax")
    assert list(groups) == ["w8a8-r7"]
    assert groups["w8a8-r7"]["weights"]["num_bits"] == 7  # the range that is used
    assert ignored == ["lm_head", pattern(DOWN)]
    assert uniform(modules, "w4a16-g128").describe() == "w4a16-g128"
    assert plan.describe() == "mixed(bf16 x 1, w8a8-r7 x 1)"
