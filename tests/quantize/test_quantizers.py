"""Scales: over what they span, how ranges are found, how they are stored; and theory beside measurement."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from quantize.core.schemes import Numbers
from quantize.make.ranges import round_inputs
from quantize.numerics.formats import E2M1, E4M3, FormatError, Integer
from quantize.numerics.granularity import PER_CHANNEL, PER_ELEMENT, PER_TENSOR, Granularity, granularity
from quantize.numerics.observers import ENTROPY, MIN_MAX, MSE, Percentile
from quantize.numerics.quantizers import Quantizer, power_of_two, quantizer
from quantize.numerics.theory import (
    laplace_clipping,
    normal_clipping,
    normal_sqnr_db,
    sine_sqnr_db,
    sqnr_db,
    uniform_noise,
)

NAMES = (
    "int8", "int4-g16", "int4-g128-asym", "int2-tensor", "int1", "int16", "int8-narrow", "e4m3",
    "e5m2-tensor", "e2m1-g16", "nf4", "nf4-dq", "mxfp4", "mxfp6", "mxfp8", "log4", "power4-g32",
    "ternary-g64", "binary", "int4-percentile", "int4-mse-g32",
)  # fmt: skip


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(x: torch.Tensor, other: torch.Tensor) -> float:
    return float((x - other).square().mean())


@pytest.mark.parametrize("name", NAMES)
def test_a_quantizers_codes_are_what_its_fake_numbers_stand_for(name: str) -> None:
    x = normal(6, 200)
    one = quantizer(name)
    found = one.quantize(x)
    assert found.codes.shape == x.shape
    assert found.scale.numel() == one.granularity.count(tuple(x.shape))
    assert torch.equal(one.dequantize(found), one.fake(x))
    assert torch.isfinite(one.fake(x)).all()
    assert one.fake(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros_or_nearly(name: str) -> None:
    assert quantizer(name).fake(torch.zeros(2, 64)).abs().max() < 1e-9


def test_finer_scales_lose_less() -> None:
    x = normal(64, 256) * torch.exp(normal(64, 256, seed=1))
    spans = (PER_TENSOR, PER_CHANNEL, Granularity("group", 32), PER_ELEMENT)
    errors = [error(x, Quantizer(Integer(4, narrow=True), one).fake(x)) for one in spans]
    assert all(a > b for a, b in itertools.pairwise(errors))
    assert errors[-1] < 1e-10  # a number with a scale of its own is exact


def test_a_last_group_that_is_not_full_is_as_one_that_is() -> None:
    x = normal(3, 40)
    whole = Quantizer(Integer(4), Granularity("group", 32)).fake(x)
    assert torch.equal(whole[:, 32:], Quantizer(Integer(4)).fake(x[:, 32:]))


@pytest.mark.parametrize("bits", [4, 6, 8, 12])
def test_uniform_numbers_lose_a_twelfth_of_the_squared_step(bits: int) -> None:
    scale = torch.tensor(2.0 / 2**bits)
    x = torch.rand(1 << 16, generator=torch.Generator().manual_seed(bits)) * 2 - 1 - scale / 2
    assert error(x, Integer(bits).fake(x, scale)) == pytest.approx(uniform_noise(float(scale)), rel=0.04)


@pytest.mark.parametrize("bits", [6, 8, 10, 12])
def test_a_full_scale_sine_has_six_decibels_a_bit_and_a_little(bits: int) -> None:
    scale = 2.0 / 2**bits
    x = (1 - scale) * torch.sin(torch.linspace(0, 2 * math.pi * 997, 1 << 17))
    noise = error(x, Integer(bits).fake(x, torch.tensor(scale)))
    assert sqnr_db(float(x.square().mean()), noise) == pytest.approx(sine_sqnr_db(bits), abs=0.35)
    assert sine_sqnr_db(bits) == pytest.approx(6.02 * bits + 1.76, abs=0.01)


@pytest.mark.parametrize("limit", [1.0, 2.0, 3.0])
def test_clipping_loses_what_theory_says(limit: float) -> None:
    x = normal(1 << 20)
    assert error(x, x.clamp(-limit, limit)) == pytest.approx(normal_clipping(limit), rel=0.06)
    y = -torch.rand(1 << 20, generator=torch.Generator().manual_seed(3)).clamp_min(1e-9).log()
    y = torch.where(normal(1 << 20, seed=4) > 0, y, -y)
    assert error(y, y.clamp(-limit, limit)) == pytest.approx(laplace_clipping(limit), rel=0.06)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_rounding_and_clipping_errors_add(bits: int) -> None:
    x = normal(1 << 18)
    for limit in (2.0, 3.0, 4.0):
        half = limit / 2**bits  # 2^bits steps from end to end, each with its code in the middle
        noise = error(x, Integer(bits).fake(x - half, torch.tensor(2 * half)) + half)
        assert sqnr_db(float(x.square().mean()), noise) == pytest.approx(normal_sqnr_db(bits, limit), abs=0.3)


def test_ranges_of_four_bits_are_best_where_theory_has_the_least_error() -> None:
    """Banner et al., arXiv:1810.05723, table 1: 2.55 standard deviations at 4 bits."""
    x = normal(1, 1 << 16)
    _, high = MSE.range(x, Integer(4), lambda scale: scale)
    assert float(high) == pytest.approx(2.55, abs=0.15)


def test_observers_cut_an_outlier_off_that_the_whole_range_keeps() -> None:
    x = normal(1, 1 << 14)
    x[0, 0] = 40.0
    form = Integer(4)
    found = {
        one.name: Quantizer(form, observer=one).fake(x) for one in (MIN_MAX, MSE, Percentile(99.9), ENTROPY)
    }
    rest = {name: error(x[:, 1:], y[:, 1:]) for name, y in found.items()}
    assert all(rest[name] < rest["minmax"] / 4 for name in ("mse", "percentile", "entropy")), rest
    assert error(x, found["mse"]) <= min(error(x, y) for y in found.values()) * 1.01


def test_importance_keeps_the_numbers_that_matter() -> None:
    x = normal(1, 4096)
    x[0, 7] = 12.0
    matters = torch.ones_like(x)
    matters[0, 7] = 1e6
    one = quantizer("int3-importance")
    assert float((one.fake(x, matters) - x)[0, 7].abs()) < float(
        (quantizer("int3-mse").fake(x) - x)[0, 7].abs()
    )
    with pytest.raises(FormatError, match="needs a weight for every number"):
        one.fake(x)


def test_binary_is_the_sign_at_the_mean_magnitude_and_ternary_has_the_papers_threshold() -> None:
    x = normal(1, 1 << 14)
    assert torch.equal(quantizer("binary").fake(x), torch.sign(x) * x.abs().mean())
    found = quantizer("ternary").quantize(x)
    threshold = x.abs()[found.codes != 1].min()
    assert float(threshold / x.abs().mean()) == pytest.approx(
        0.75, abs=0.08
    )  # about 0.7 there, 0.766 exactly


def test_block_scales_of_microscaling_are_powers_of_two_that_the_specification_has() -> None:
    most = torch.tensor([6.0, 5.9, 4.0, 3.99, 0.0, 448.0])
    assert power_of_two(most, E2M1.top).tolist()[:4] == [1.0, 1.0, 1.0, 0.5]
    assert float(power_of_two(most[5:], E4M3.top)) == 1.0
    found = quantizer("mxfp4").quantize(normal(4, 64))
    powers, _ = torch.frexp(found.scale)
    assert (powers == 0.5).all()


def test_double_quantization_costs_little_and_takes_0_127_bits_for_scales() -> None:
    x = normal(64, 4096) * 0.02
    one, two = quantizer("nf4"), quantizer("nf4-dq")
    assert two.bits_per_number((4096, 4096)) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))
    assert one.bits_per_number((4096, 4096)) == 4.5
    assert error(x, two.fake(x)) < 1.02 * error(x, one.fake(x))


def test_nf4_loses_less_of_normal_weights_than_integers_and_floats_of_four_bits() -> None:
    x = normal(64, 1024)
    errors = {name: error(x, quantizer(f"{name}-g64").fake(x)) for name in ("nf4", "int4", "e2m1", "log4")}
    assert min(errors, key=lambda name: errors[name]) == "nf4"
    assert max(errors, key=lambda name: errors[name]) == "log4"


def old_inputs(x: torch.Tensor, how: Numbers) -> torch.Tensor:
    """A token's range as kernels find it, written out."""
    if how.kind == "float":
        scale = (x.abs().amax(-1, keepdim=True) / 448).clamp_min(1e-12)
        return (x / scale).to(torch.float8_e4m3fn).float() * scale
    last = 2 ** (how.bits - 1) - 1
    scale = (x.abs().amax(-1, keepdim=True) / last).clamp_min(1e-12)
    return (x / scale).round().clamp(-last - 1, last) * scale


@pytest.mark.parametrize(
    "how", [Numbers(8, "int", "token"), Numbers(4, "int", "token"), Numbers(8, "float", "token")]
)
def test_inputs_are_rounded_bit_for_bit_as_a_kernel_rounds_them(how: Numbers) -> None:
    x = normal(3, 17, 96) * torch.exp(3 * normal(3, 17, 1, seed=2))
    x[0, 0] = 0
    assert torch.equal(round_inputs(x, how), old_inputs(x, how))


def test_inputs_with_a_zero_point_are_within_half_a_step_and_keep_zero() -> None:
    x = normal(5, 64) + 2
    x[:, 0] = 0
    found = round_inputs(x, Numbers(8, "int", "token", symmetric=False))
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True).clamp_max(0)) / 255
    assert ((found - x).abs() <= step * 1.01).all()
    assert (found[:, 0] == 0).all()


@pytest.mark.parametrize(
    "name",
    ["int0", "int17", "fp4", "int4-g0", "int4-rows", "e4m3-asym", "int4-dq", "mxfp5", "nf4-narrow", ""],
)
def test_names_that_mean_nothing_are_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(FormatError):
        quantizer(name)


def test_granularities_have_names() -> None:
    assert granularity("g64") == Granularity("group", 64)
    assert granularity("element") == PER_ELEMENT
    with pytest.raises(FormatError, match="have a size"):
        Granularity("group")
