"""Fake quantization against the papers' formulas, by hand and by differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantize.core.schemes import scheme
from quantize.make.ranges import Grid, find_grid, restored, rounded
from quantize.numerics.formats import integer
from quantize.plan.tune import spread
from quantize.train.qat_fake import StoredScale, TrainedWeight, fake_quantize, fake_tensor


def slopes(weight: Tensor, scale: Tensor, zero: Tensor | None, saturating: bool) -> tuple[Tensor, Tensor]:
    weight, scale = weight.clone().requires_grad_(), scale.clone().requires_grad_()
    torch.autograd.backward(fake_quantize(weight, scale, zero, integer(4), weight.shape[1], saturating).sum())
    assert weight.grad is not None
    assert scale.grad is not None
    return weight.grad, scale.grad


def test_a_weight_in_the_range_passes_its_gradient_and_the_step_learns_by_the_rounding_error() -> None:
    """LSQ, equation 3: round(w / s) - w / s."""
    of_weight, of_scale = slopes(torch.tensor([[0.13, -0.26]]), torch.tensor([[0.1]]), None, True)
    assert of_weight.tolist() == [[1, 1]]
    assert of_scale.item() == pytest.approx((1 - 1.3) + (-3 + 2.6), abs=1e-5)


def test_a_clipped_weight_passes_nothing_when_saturating_and_the_step_learns_by_the_limit() -> None:
    """LSQ, equation 3 beyond the range: -Q_N below, Q_P above."""
    weight, scale = torch.tensor([[2.0, -2.0, -2.0]]), torch.tensor([[0.1]])
    of_weight, of_scale = slopes(weight, scale, None, True)
    assert of_weight.tolist() == [[0, 0, 0]]
    assert of_scale.item() == 7 - 8 - 8
    plain, same = slopes(weight, scale, None, False)
    assert plain.tolist() == [[1, 1, 1]]
    assert same.item() == of_scale.item()


def test_a_zero_point_moves_the_range() -> None:
    """With z = 5 the grid goes from -13 to 2 steps."""
    zero = torch.tensor([[5.0]])
    out = fake_quantize(torch.tensor([[-1.28, 0.5]]), torch.tensor([[0.1]]), zero, integer(4), 2)
    assert torch.allclose(out, torch.tensor([[-1.3, 0.2]]))
    of_weight, of_scale = slopes(torch.tensor([[-1.28, 0.5]]), torch.tensor([[0.1]]), zero, True)
    assert of_weight.tolist() == [[1, 0]]
    assert of_scale.item() == pytest.approx((-13 + 12.8) + 2, abs=1e-5)


def test_step_sizes_of_clipped_weights_have_the_gradient_that_differences_give() -> None:
    """Where all is clipped ŵ is linear in s."""
    weight, scale = torch.tensor([[3.0, -4.0, 5.0]]), torch.tensor([[0.1]])
    _, slope = slopes(weight, scale, None, True)
    up = fake_quantize(weight, scale + 0.01, None, integer(4), 3).sum()
    down = fake_quantize(weight, scale - 0.01, None, integer(4), 3).sum()
    assert slope.item() == pytest.approx(((up - down) / 0.02).item(), rel=1e-4)


def begun(name: str, weight: Tensor, original: Tensor | None) -> tuple[TrainedWeight, Tensor]:
    """Begun with plain rounding of ``weight``, and what that stands for."""
    grid = find_grid(weight, scheme(name), "minmax", None, torch.bfloat16)
    codes = rounded(weight, grid)
    stored = grid.scale.to(torch.bfloat16)
    one = TrainedWeight.begin(codes, StoredScale(stored, spread(stored)), grid, original, True)
    return one, restored(codes, grid)


@pytest.mark.parametrize(
    "name", ["w4a16-g32", "w4a16-g32-asym", "w2a16-g16-asym", "w3a16", "w8a8", "w8a8-r7", "fp8-dynamic"]
)
@pytest.mark.parametrize("original", ["itself", "another", "none"])
def test_training_begins_with_the_stored_integers_whatever_the_weights_were(name: str, original: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 96) * 0.05
    given = {"itself": weight, "another": weight + 0.05 * torch.randn_like(weight), "none": None}[original]
    one, wanted = begun(name, weight, given)
    assert torch.equal(one.fake(), wanted)
    assert torch.equal(restored(one.codes(), one.grid()), wanted)


@pytest.mark.parametrize("name", ["w4a16-g32-asym", "w3a16-g32", "w8a8", "fp8-dynamic"])
def test_what_is_computed_with_is_what_is_stored_after_any_change(name: str) -> None:
    torch.manual_seed(1)
    one, _ = begun(name, torch.randn(24, 96), None)
    one.latent = one.latent + 0.1 * torch.randn_like(one.latent)
    one.scale.change = one.scale.change + 0.1 * torch.randn_like(one.scale.change)
    grid = one.grid()
    assert torch.equal(grid.scale, grid.scale.to(torch.bfloat16).float())
    assert torch.equal(restored(one.codes(), grid), one.fake())


def test_a_matrix_whose_inputs_do_not_fill_the_last_group_keeps_its_shape() -> None:
    grid = Grid(torch.full((4, 2), 0.1), None, -8, 7, 32)
    weight = torch.randn(4, 40, requires_grad=True)
    out = fake_quantize(weight, grid.scale, None, integer(4), 32)
    torch.autograd.backward(out.sum())
    assert out.shape == (4, 40)
    assert torch.equal(out, restored(rounded(weight.detach(), grid), grid))
    assert weight.grad is not None
    assert weight.grad.shape == (4, 40)


def test_keys_and_inputs_of_any_shape_have_one_step() -> None:
    x = torch.randn(2, 3, 4, 5)
    scale = torch.tensor([0.05], requires_grad=True)
    out = fake_tensor(x, scale, integer(8))
    assert torch.allclose(out, (x / 0.05).round().clamp(-128, 127) * 0.05)
    torch.autograd.backward(out.sum())
    assert scale.grad is not None
