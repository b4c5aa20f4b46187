"""A few weights in 16 bits beside a quantized matrix: which ones, what that gains, and what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantize.compact.make import take
from quantize.compact.outliers import kept_high
from quantize.compact.steps import CompactError, parse_step
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import read_modules
from quantize.numerics.quantizers import quantizer
from tests.quantize.test_compact import IDS
from tests.quantize.tiny import make_checkpoint

FORM = "int3-g32-asym-importance"


def with_outliers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, where a hundredth of it is ten times as large, and E[x²]."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    planted = torch.rand(64, 128, generator=generator) < 0.01
    return (
        torch.where(planted, 10 * weight.sign() + weight, weight),
        planted,
        torch.rand(128, generator=generator) + 0.5,
    )


def test_outliers_are_found_and_stay_exactly_what_they_were() -> None:
    weight, planted, importance = with_outliers()
    found = kept_high(weight, quantizer(FORM), 0.01, importance)
    same = found.weight == weight
    assert found.outliers == round(0.01 * weight.numel())
    assert int(same.sum()) >= found.outliers
    assert int((same & planted).sum()) >= 0.9 * min(found.outliers, int(planted.sum()))


def test_more_of_them_leave_less_error_and_take_more_bits() -> None:
    weight, _, importance = with_outliers()
    errors, bits = [], []
    for share in (0.0, 0.005, 0.01, 0.03, 0.1):
        found = kept_high(weight, quantizer(FORM), share, importance)
        errors.append(float(((found.weight - weight).square() * importance).sum()))
        bits.append(found.bits)
    assert errors == sorted(errors, reverse=True)
    assert bits == sorted(bits)
    # What the ranges were widened for is gone: more than the outliers' own errors.
    assert errors[2] < 0.5 * errors[0]


def test_without_any_it_is_plain_rounding() -> None:
    weight, _, importance = with_outliers()
    form = quantizer(FORM)
    found = kept_high(weight, form, 0.0, importance)
    assert torch.equal(found.weight, form.fake(weight, importance))
    assert found.bits == pytest.approx(weight.numel() * form.bits_per_number((64, 128)))


def test_bits_are_those_of_a_sparse_matrix_beside_a_dense_one() -> None:
    weight, _, importance = with_outliers()
    dense, both = (kept_high(weight, quantizer(FORM), share, importance) for share in (0.0, 0.01))
    assert both.bits - dense.bits == both.outliers * 32 + 64 * 32


def test_a_model_keeps_its_shape_and_says_what_it_would_take(tmp_path: Path) -> None:
    tiny = open_checkpoint(make_checkpoint(tmp_path / "tiny"))
    done = take(tiny, parse_step(f"outliers:0.01:{FORM}"), IDS, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (tiny.path, tmp_path / "out"))
    linears = read_modules(tiny).linears
    for name, tensor in before.items():
        assert after[name].shape == tensor.shape
        if name.removesuffix(".weight") not in {one.name for one in linears}:
            assert torch.equal(after[name], tensor)
    one = linears[0]
    same = after[f"{one.name}.weight"] == before[f"{one.name}.weight"]
    assert int(same.sum()) >= round(0.01 * one.weights)
    assert done.bytes_named is not None
    assert done.bytes_named < done.bytes_after == done.bytes_before
    assert "no engine here adds a sparse matrix" in done.exploited
    assert done.step == f"outliers:0.01:{FORM}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("outliers:0.01", "name a quantizer"),
        ("wanda:0.5:int3", "and nothing else"),
        ("outliers:1:int3", "from 0 to below 1"),
        ("outliers:0.01:int99", "int"),
        ("outliers:2:4", "name a quantizer"),
    ],
)
def test_outliers_that_mean_nothing_are_refused(text: str, words: str) -> None:
    with pytest.raises(CompactError, match=words):
        parse_step(text)
