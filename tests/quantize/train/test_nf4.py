"""Frozen linear modules in NF4 with double quantization."""

from __future__ import annotations

import pytest
import torch

from quantize.numerics.quantizers import quantizer
from quantize.train.nf4 import BITS, Nf4Linear


def _weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05


@pytest.mark.parametrize("shape", [(48, 64), (33, 70), (128, 576), (1, 3), (5, 129)])
def test_what_is_packed_comes_back_as_the_quantizer_says(shape: tuple[int, int]) -> None:
    weight = _weight(*shape)
    got = Nf4Linear(weight).dequantized(torch.float32)
    assert torch.equal(got, quantizer("nf4-dq").fake(weight))


def test_double_quantization_adds_little_to_the_error_of_four_bits() -> None:
    weight = _weight(256, 512)
    once = float((quantizer("nf4").fake(weight) - weight).norm() / weight.norm())
    twice = float((Nf4Linear(weight).dequantized(torch.float32) - weight).norm() / weight.norm())
    assert 0.08 < once < 0.11
    assert abs(twice - once) < 0.005


def test_a_weight_takes_little_more_than_four_bits() -> None:
    module = Nf4Linear(_weight(256, 512))
    assert 8 * module.stored_bytes / (256 * 512) == pytest.approx(BITS, abs=0.01)
    assert pytest.approx(4.127, abs=0.001) == BITS


def test_gradients_of_inputs_are_those_of_a_plain_matrix() -> None:
    module = Nf4Linear(_weight(24, 64), torch.randn(24))
    plain = torch.nn.Linear(64, 24)
    plain.weight.data, plain.bias.data = module.dequantized(torch.float32), module.bias.data
    inputs, found = torch.randn(2, 5, 64), []
    for one in (module, plain):
        x = inputs.clone().requires_grad_()
        one(x).square().sum().backward()
        assert x.grad is not None
        found.append(x.grad)
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert module.weight.grad is None
