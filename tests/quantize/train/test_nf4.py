"""Our own NF4 with double quantization."""

from __future__ import annotations

import pytest
import torch

from quantize.train.nf4 import BITS, BLOCK, LEVELS, Nf4Linear, Packed, maxima


@pytest.mark.parametrize("shape", [(48, 64), (33, 70), (128, 576), (1, 3)])
def test_values_come_back_as_the_nearest_level_of_their_block(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    module = Nf4Linear(weight)
    got = module.dequantized(torch.float32)
    packed = Packed(weight)
    known = maxima(packed.absmax, packed.scales, packed.mean).repeat_interleave(BLOCK)[: weight.numel()]
    every = known[:, None] * torch.tensor(LEVELS)
    nearest = every.gather(1, (every - weight.reshape(-1, 1)).abs().argmin(1, keepdim=True))[:, 0]
    assert got.shape == weight.shape
    assert torch.allclose(got.reshape(-1), nearest, atol=1e-7)


def test_the_error_is_that_of_four_bits_and_double_quantization_adds_little() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    blocks = weight.view(-1, BLOCK)
    single = blocks / blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(LEVELS)
    rounded = levels[(single[..., None] - levels).abs().argmin(-1)] * blocks.abs().amax(1, keepdim=True)
    plain = float((rounded - blocks).norm() / blocks.norm())
    double = float((Nf4Linear(weight).dequantized(torch.float32) - weight).norm() / weight.norm())
    assert 0.08 < plain < 0.11
    assert abs(double - plain) < 0.005


def test_a_weight_takes_little_more_than_four_bits() -> None:
    module = Nf4Linear(torch.randn(256, 512))
    assert 8 * module.stored_bytes / (256 * 512) == pytest.approx(BITS, abs=0.01)
    assert pytest.approx(4.127, abs=0.001) == BITS


def test_gradients_of_inputs_are_those_of_a_plain_matrix() -> None:
    module = Nf4Linear(torch.randn(24, 64), torch.randn(24))
    plain = torch.nn.Linear(64, 24)
    plain.weight.data, plain.bias.data = module.dequantized(torch.float32), module.bias.data
    inputs = torch.randn(2, 5, 64)
    found = []
    for one in (module, plain):
        x = inputs.clone().requires_grad_()
        one(x).square().sum().backward()
        assert x.grad is not None
        found.append(x.grad)
    assert torch.allclose(found[0], found[1], atol=1e-4)
    assert module.weight.grad is None


def test_zeros_stay_zeros() -> None:
    weight = torch.randn(64, 64)
    weight[:8] = 0
    assert bool((Nf4Linear(weight).dequantized(torch.float32)[:8].abs() < 1e-3).all())
