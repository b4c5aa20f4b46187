"""Every format against its definition: tables, torch's own types, papers' formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.core.dequantize import E2M1 as STORED_E2M1
from quantize.numerics.codebooks import (
    BINARY,
    NF4,
    TERNARY,
    k_means,
    logarithmic,
    normal_float,
    power_law,
    quantiles,
)
from quantize.numerics.formats import E2M1, E2M3, E3M2, E4M3, E5M2, Float, Format, FormatError, Integer, Table

ONE = torch.tensor(1.0)
FORMATS: list[Format] = [
    *(Integer(bits) for bits in range(1, 17)),
    *(Integer(bits, symmetric_codes=False) for bits in (1, 2, 3, 4, 8, 16)),
    *(Integer(bits, narrow=True) for bits in (2, 4, 8)),
    E4M3, E5M2, E2M1, E2M3, E3M2,
    normal_float(2), normal_float(4), logarithmic(3), logarithmic(8), power_law(4), TERNARY, BINARY,
]  # fmt: skip


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_every_code_comes_back_from_what_it_stands_for(form: Format) -> None:
    codes = form.codes()
    for scale in (ONE, torch.tensor(0.037)):
        zero = torch.tensor(float(codes[len(codes) // 3])) if not form.symmetric else None
        values = form.dequantize(codes, scale, zero)
        again = form.quantize(values, scale, zero)
        assert again.dtype == codes.dtype
        assert torch.equal(again.float(), codes.float())
        assert torch.equal(form.fake(values, scale, zero), values)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_levels_rise_and_are_what_codes_stand_for(form: Format) -> None:
    levels = form.levels()
    assert (levels.diff() > 0).all()
    zero = None if form.symmetric else torch.tensor(0.0)
    assert torch.equal(form.dequantize(form.codes(), ONE, zero).unique(), levels)
    assert len(form.codes()) <= 2**form.bits


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_numbers_go_to_the_nearest_level(form: Format, data: Any) -> None:
    wide = 1.2 * form.top
    shares = data.draw(st.lists(st.floats(-1, 1, allow_subnormal=False), min_size=1, max_size=20))
    x = torch.tensor(shares) * wide
    zero = None if form.symmetric else torch.tensor(0.0)
    found = form.dequantize(form.quantize(x, ONE, zero), ONE, zero)
    levels = form.levels().double()
    nearest = (x.double().unsqueeze(-1) - levels).abs().amin(-1)
    assert torch.allclose((x.double() - found.double()).abs(), nearest, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", [E4M3, E5M2])
def test_floats_of_eight_bits_are_torchs_bit_by_bit(form: Float) -> None:
    assert form.native is not None
    kind = getattr(torch, form.native)
    every = torch.arange(256, dtype=torch.uint8).view(kind).float()
    finite = every[every.isfinite()]
    assert form.largest == torch.finfo(kind).max
    assert torch.equal(form.levels(), finite.unique())
    # The rule of rounding that formats without a torch type have is theirs as well, ties included.
    ordered = finite.unique()
    middles = (ordered[1:] + ordered[:-1]) / 2
    x = torch.cat([finite, middles, middles.nextafter(ONE * 1e9), middles.nextafter(-ONE * 1e9)])
    assert torch.equal(form.rounded(x), x.to(kind).float())
    assert torch.equal(form.quantize(x, ONE).view(torch.uint8), x.to(kind).view(torch.uint8))


def test_floats_of_four_bits_are_those_of_the_ocp_table() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    expected = torch.tensor([*STORED_E2M1, *(-value for value in STORED_E2M1)])
    assert torch.equal(E2M1.dequantize(codes, ONE), expected)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert E2M1.fake(ties, ONE).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("form", "largest", "smallest"), [(E4M3, 448.0, 2.0**-9), (E5M2, 57344.0, 2.0**-16),
                                      (E2M1, 6.0, 0.5), (E2M3, 7.5, 0.125), (E3M2, 28.0, 0.0625)],
)  # fmt: skip
def test_floats_end_where_the_specification_has_it(form: Float, largest: float, smallest: float) -> None:
    levels = form.levels()
    assert levels[-1] == largest
    assert levels[levels > 0][0] == smallest


@pytest.mark.parametrize("form", [E4M3, E5M2, E2M1])
def test_what_is_beyond_the_range_becomes_its_end(form: Float) -> None:
    x = torch.tensor([math.inf, -math.inf, 3 * form.largest])
    assert form.fake(x, ONE).tolist() == [form.largest, -form.largest, form.largest]


def test_nf4s_published_numbers_are_the_quantiles_that_the_paper_derives_them_from() -> None:
    assert NF4.values == pytest.approx(quantiles(4), abs=3e-7)
    assert normal_float(4) is NF4


def test_codes_of_nf4_are_about_equally_frequent_in_normal_numbers() -> None:
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    normal = torch.distributions.Normal(0.0, 1.0)
    # The levels reach to the quantile 0.9677, so that this is what one is at the scale of the paper.
    scale = normal.icdf(torch.tensor(0.9677083))
    counts = normal_float(4).quantize(x, scale).long().bincount(minlength=16) / len(x)
    assert counts.min() > 0.7 / 16
    assert counts.max() < 1.3 / 16


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_scale_and_zero_point_are_those_of_the_paper(bits: int) -> None:
    form = Integer(bits, symmetric_codes=False)
    low, high = torch.tensor(-0.71), torch.tensor(2.29)
    scale = form.scale_of(low, high)
    zero = form.zero_of(low, scale)
    assert float(scale) == pytest.approx(3.0 / (2**bits - 1))
    assert zero is not None
    assert float(zero) == round(-(2 ** (bits - 1)) + 0.71 / float(scale))
    assert float(form.fake(torch.tensor(0.0), scale, zero)) == 0.0


@pytest.mark.parametrize("low", [0.5, -3.0])
def test_zero_is_in_every_asymmetric_range(low: float) -> None:
    form = Integer(4, symmetric_codes=False)
    x = torch.tensor([low, low + 1.0])
    scale = form.scale_of(*x.aminmax())
    zero = form.zero_of(x.amin(), scale)
    assert float(form.fake(torch.tensor(0.0), scale, zero)) == 0.0
    assert (form.fake(x, scale, zero) - x).abs().max() <= scale / 2 + 1e-6


def test_symmetric_scales_cover_the_largest_magnitude() -> None:
    x = torch.tensor([-3.0, 1.0])
    assert float(Integer(8).scale_of(*x.aminmax())) == pytest.approx(3 / 127.5)
    assert float(Integer(8, narrow=True).scale_of(*x.aminmax())) == pytest.approx(3 / 127)


def test_powers_of_two_are_shifts() -> None:
    assert logarithmic(3).values == (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)


def test_power_laws_are_equal_steps_after_the_power() -> None:
    assert [math.sqrt(value) for value in power_law(4).values[7:]] == pytest.approx([n / 7 for n in range(8)])


def test_k_means_finds_clusters_and_loses_less_than_equal_steps() -> None:
    noise = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    clusters = torch.tensor([-2.0, -0.5, 0.1, 3.0]).repeat_interleave(750) + 0.01 * noise
    book = k_means(clusters, 2)
    assert book.values == pytest.approx((-2.0, -0.5, 0.1, 3.0), abs=0.01)
    mine = (k_means(noise, 3).fake(noise, ONE) - noise).square().mean()
    assert mine < (Integer(3).fake(noise) - noise).square().mean()
    assert k_means(torch.zeros(10), 2).values[0] == 0.0


def test_weights_draw_a_codebook_to_what_matters() -> None:
    x = torch.linspace(0, 1, 1001)
    heavy = torch.where(x > 0.9, 1000.0, 1.0)
    assert sum(value > 0.9 for value in k_means(x, 3, heavy).values) >= 4


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Integer(0), "1 to 16 bits"),
        (lambda: Integer(17), "1 to 16 bits"),
        (lambda: Integer(1, narrow=True), "leave narrow out"),
        (lambda: Integer(4, symmetric_codes=False, narrow=True), "leave narrow out"),
        (lambda: Table("one", (1.0,)), "two or more"),
        (lambda: Table("falls", (1.0, 0.0)), "rise"),
        (lambda: normal_float(9), "2 to 8 bits"),
        (lambda: logarithmic(1), "2 to 8 bits"),
        (lambda: power_law(4, 0.0), "between 0.2 and 5"),
        (lambda: k_means(torch.zeros(3), 0), "1 to 8 bits"),
    ],
)
def test_formats_that_cannot_be_are_refused(make: Any, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        make()
